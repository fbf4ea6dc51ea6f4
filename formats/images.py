"""Image files of any common kind, opened as a viewer shows them."""

import contextlib
import io
import math

import numpy as np
from PIL import Image, ImageCms, ImageOps

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"
WHITE = {"I": (2**16 - 1, 2**31, 2**32), "F": (1, 2**8 - 1, 2**16 - 1)}  # values of white, by Pillow's mode
MAX_PIXELS = 2**26  # of an image: a small file may hold more than the memory
MAX_SCANS = 2**30  # times pixels, of a progressive JPEG: ten are usual, each takes a second where pixels are many
MAX_RATIO = 32  # of an image's sides: more of a strip would not be seen, but fill the memory
PHOTOMETRIC, WHITE_IS_ZERO, SAMPLE_FORMAT, SIGNED = 262, 0, 339, 2  # two tags of TIFF, and values of theirs
BITS = 258  # another tag: of a sample
SCREEN = 2.2  # gamma
SCALES = {"L;2": 85, "L;4": 17}  # of greys of 2 and of 4 bits, by the raw mode of a PNG


def open_image(path):
    """An image file -> PIL, RGB. Raises whatever Pillow raises for a damaged file.

    EXIF orientation and the color profile are applied, transparency is composited on white, more than 8 bits are scaled
    to 8. Of a long strip the middle is left. Only FORMATS are tried: Pillow would start Ghostscript for an EPS file.
    """
    with Image.open(path, formats=FORMATS) as image:
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {image.width} × {image.height}")
        scans = 1 + image.fp.read(2**26).count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
        if math.prod(image.size) * scans > MAX_SCANS:
            raise ValueError(f"expected at most {MAX_SCANS // math.prod(image.size)} scans, got {scans}")
        if isinstance(hidden := image.info.get("transparency"), int):
            image.info["transparency"] = hidden * SCALES.get(image.tile[0].args, 1)  # Pillow scales the pixels alone
        tags = getattr(image, "tag_v2", {})
        image = first_frame(image) if image.format == "GIF" else upright(image)
        if image.mode[0] in "IF":
            image = to_eight_bits(image, tags)
        alpha = None
        if image.has_transparency_data or image.mode == "P":  # apart: the profile of a grey image fits no RGBA
            whole, is_grey = image.convert("RGBA"), image.mode in ("L", "LA")
            image, alpha = image.convert("L") if is_grey else whole.convert("RGB"), whole.getchannel("A")
        image = to_srgb(image).convert("RGB")
        if alpha:
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        longest = MAX_RATIO * min(image.size)
        return ImageOps.fit(image, [min(side, longest) for side in image.size])


def first_frame(image):
    """A GIF's first frame. Beside a small one is nothing, where Pillow paints a color that no viewer shows."""
    box, canvas = image.tile[0].extents, Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(box), box[:2])
    return canvas


def upright(image):
    """Turn an image as its EXIF says. A damaged EXIF is ignored, as viewers do."""
    image.load()  # a PNG's may come after the pixels
    with contextlib.suppress(Exception):  # damage can raise anything
        image.getexif()  # which keeps what it has read
    for key in "exif", "Raw profile type exif":  # Pillow would write it anew, and fail for tags of odd types
        image.info.pop(key, None)
    return ImageOps.exif_transpose(image)


def to_srgb(image):
    """Colors of the image's profile, of LAB, or of a PNG's gamma, become those of a screen.

    A damaged or unfit profile is ignored.
    """
    gamma = image.info.get("gamma", 0) if "srgb" not in image.info else 0
    source = ImageCms.createProfile("LAB") if image.mode == "LAB" else image.info.get("icc_profile")
    if source:
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        with contextlib.suppress(ImageCms.PyCMSError):
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif 0 < gamma < 10 and abs(SCREEN * gamma - 1) > 0.05:  # from which on libpng heeds it
        table = [round(255 * (x / 255) ** (1 / (SCREEN * gamma))) for x in range(256)]
        return image.point(table * len(image.getbands()))
    return image


def to_eight_bits(image, tags):
    """16-bit greys, 32-bit integers or floats -> PIL, grey, and transparent where a PNG says so. tags: of a TIFF."""
    pixels, hidden = np.asarray(image), image.info.get("transparency")
    if image.mode == "I" and SIGNED not in tags.get(SAMPLE_FORMAT, ()):
        pixels = pixels.view(np.uint32)  # Pillow makes signed integers of unsigned ones
    if tags.get(BITS) == (12,):  # which Pillow does not scale to 16
        pixels = pixels << 4 | pixels >> 8
    if image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow heeds for 8 bits alone
        pixels = 2**16 - 1 - pixels
    alpha = Image.fromarray(255 * (pixels != hidden).astype(np.uint8)) if isinstance(hidden, int) else None
    pixels = pixels.astype(np.float32)
    largest = pixels.max(where=np.isfinite(pixels), initial=0)
    pixels /= next((white for white in WHITE[image.mode[0]] if largest <= white), largest)
    pixels *= 255  # in place: an image of MAX_PIXELS has 268 MB of them
    np.nan_to_num(pixels.round(out=pixels), copy=False).clip(0, 255, out=pixels)
    grey = Image.fromarray(pixels.astype(np.uint8))
    grey.info |= {key: image.info[key] for key in ("icc_profile", "gamma", "srgb") if key in image.info}
    if alpha:
        grey.putalpha(alpha)
    return grey
