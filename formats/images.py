"""Image files of any common kind, opened as a viewer shows them."""

import math

import numpy as np
from PIL import Image, ImageOps

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"
WHITE = {"I": (2**16 - 1, 2**31, 2**32), "F": (1, 2**8 - 1, 2**16 - 1)}  # values of white, by Pillow's mode
MAX_PIXELS = 2**26  # of an image: a small file may hold more than the memory
MAX_RATIO = 32  # of an image's sides: more of a strip would not be seen, but fill the memory


def open_image(path):
    """An image file -> PIL, RGB. Raises whatever Pillow raises for a damaged file.

    EXIF orientation is applied, transparency is composited on white, more than 8 bits are scaled to 8. Of a long strip
    the middle is left. Only FORMATS are tried, because Pillow would start Ghostscript for an EPS file.
    """
    with Image.open(path, formats=FORMATS) as image:
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {image.width} × {image.height}")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = to_eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        longest = MAX_RATIO * min(image.size)
        return ImageOps.fit(image.convert("RGB"), [min(side, longest) for side in image.size])


def to_eight_bits(image):
    """16-bit greys, 32-bit integers or floats -> PIL, grey, and transparent where a PNG says so."""
    pixels, hidden = np.asarray(image), image.info.get("transparency")
    pixels = pixels.view(np.uint32) if image.mode == "I" else pixels  # Pillow makes signed integers of unsigned ones
    alpha = Image.fromarray(255 * (pixels != hidden).astype(np.uint8)) if isinstance(hidden, int) else None
    pixels = pixels.astype(np.float32)
    largest = pixels.max(where=np.isfinite(pixels), initial=0)
    pixels /= next((white for white in WHITE[image.mode[0]] if largest <= white), largest)
    pixels *= 255  # in place: an image of MAX_PIXELS has 268 MB of them
    np.nan_to_num(pixels.round(out=pixels), copy=False).clip(0, 255, out=pixels)
    grey = Image.fromarray(pixels.astype(np.uint8))
    if alpha:
        grey.putalpha(alpha)
    return grey
