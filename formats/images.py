"""Image files of any common kind, opened as a viewer shows them."""

import numpy as np
from PIL import Image, ImageOps

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"
WHITE = {"I": (2**16 - 1, 2**32 - 1), "F": (1, 2**8 - 1, 2**16 - 1, float("inf"))}  # values of white, by Pillow's mode
MAX_RATIO = 32  # of an image's sides: more of a strip would not be seen, but fill the memory


def open_image(path):
    """An image file -> PIL, RGB. Raises whatever Pillow raises for a damaged file.

    EXIF orientation is applied, transparency is composited on white, more than 8 bits are scaled to 8. Of a long strip
    the middle is left. Only FORMATS are tried, because Pillow would start Ghostscript for an EPS file.
    """
    with Image.open(path, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16-bit greys, 32-bit integers, floats
            pixels = np.asarray(image, np.float64)
            white = next(top for top in WHITE[image.mode[0]] if pixels.max() <= top)
            image = Image.fromarray((pixels / white * 255).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        longest = MAX_RATIO * min(image.size)
        return ImageOps.fit(image.convert("RGB"), [min(side, longest) for side in image.size])
