"""Image files of any common kind, opened as a viewer shows them."""

import contextlib
import io
import math

import numpy as np
from PIL import Image, ImageCms, ImageOps

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"
WHITE = {"I": (2**16 - 1, 2**31, 2**32), "F": (1, 2**8 - 1, 2**16 - 1)}  # values of white, by Pillow's mode
MAX_PIXELS = 2**26  # of an image: a small file may hold more than the memory
MAX_RATIO = 32  # of an image's sides: more of a strip would not be seen, but fill the memory
PHOTOMETRIC, WHITE_IS_ZERO, SAMPLE_FORMAT, SIGNED = 262, 0, 339, 2  # two tags of TIFF, and values of theirs
SCALES = {"L;2": 85, "L;4": 17}  # of greys of 2 and of 4 bits, by the raw mode of a PNG


def open_image(path):
    """An image file -> PIL, RGB. Raises whatever Pillow raises for a damaged file.

    EXIF orientation and the color profile are applied, transparency is composited on white, more than 8 bits are scaled
    to 8. Of a long strip the middle is left. Only FORMATS are tried: Pillow would start Ghostscript for an EPS file.
    """
    with Image.open(path, formats=FORMATS) as image:
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {image.width} × {image.height}")
        if isinstance(hidden := image.info.get("transparency"), int):
            image.info["transparency"] = hidden * SCALES.get(image.tile[0].args, 1)  # Pillow scales the pixels alone
        tags = getattr(image, "tag_v2", {})
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = to_eight_bits(image, tags)
        if image.has_transparency_data or image.mode == "P":
            image = image.convert("RGBA")
        image = to_srgb(image)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        longest = MAX_RATIO * min(image.size)
        return ImageOps.fit(image.convert("RGB"), [min(side, longest) for side in image.size])


def to_srgb(image):
    """Colors of the image's profile, or of LAB, become those of a screen. A damaged or unfit profile is ignored."""
    source = ImageCms.createProfile("LAB") if image.mode == "LAB" else image.info.get("icc_profile")
    if source:
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        with contextlib.suppress(ImageCms.PyCMSError):
            mode = "RGBA" if image.mode == "RGBA" else "RGB"
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    return image


def to_eight_bits(image, tags):
    """16-bit greys, 32-bit integers or floats -> PIL, grey, and transparent where a PNG says so. tags: of a TIFF."""
    pixels, hidden = np.asarray(image), image.info.get("transparency")
    if image.mode == "I" and SIGNED not in tags.get(SAMPLE_FORMAT, ()):
        pixels = pixels.view(np.uint32)  # Pillow makes signed integers of unsigned ones
    if image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow heeds for 8 bits alone
        pixels = 2**16 - 1 - pixels
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
