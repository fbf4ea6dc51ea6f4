"""Images are read as a viewer shows them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, UnidentifiedImageError

from formats.images import open_image


RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
ALPHA = np.linspace(0, 255, 24).round().astype(np.uint8).reshape(6, 4, 1)
GREY, RAMP = RGB[..., :1], np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4)
HIDDEN = (RGB == RGB[0, 0]).all(-1, keepdims=True)  # where a PNG's tRNS says that this color is transparent
ORIENTED = {  # EXIF orientation: what a viewer does with the rows and columns of the file
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: np.rot90}


def composited(color, alpha):
    return color * (alpha / 255) + 255 - alpha


def oriented(k):
    exif = Image.Exif()
    exif[0x0112] = k
    return {"exif": exif}


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
SWAPPED = SRGB.tobytes().replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")
GREY_PROFILE = bytearray(SRGB.tobytes().replace(b"RGB XYZ", b"GRAYXYZ").replace(b"rTRC", b"kTRC"))
curve, = struct.unpack(">I", GREY_PROFILE[GREY_PROFILE.index(b"kTRC") + 4:][:4])
GREY_PROFILE[curve:curve + 12] = b"curv" + bytes(8)  # no points: linear
palette, red, gray = Image.fromarray(RGB).quantize(24), *(Image.new("RGB", (4, 6), name) for name in ("red", "gray"))
rgba, la = (Image.fromarray(np.concatenate([color, ALPHA], -1).squeeze()) for color in (RGB, GREY))
LIGHT = np.asarray(ImageCms.profileToProfile(Image.fromarray(GREY[..., 0]), io.BytesIO(GREY_PROFILE), SRGB,
                                             outputMode="RGB"))  # the greys that the profile means
SHOWN = {  # file: (image, options, (H, W, 3) as a viewer shows it)
    **{f"exif {k}.png": (Image.fromarray(RGB), oriented(k), turn(RGB)) for k, turn in ORIENTED.items()},
    "rgba.png": (rgba, {}, composited(RGB, ALPHA)), "rgba.tiff": (rgba, {}, composited(RGB, ALPHA)),
    "rgba.webp": (rgba, {"lossless": True, "exact": True}, composited(RGB, ALPHA)),
    "la.png": (la, {}, composited(GREY, ALPHA)),
    "trns L.png": (Image.fromarray(GREY[..., 0]), {"transparency": int(GREY[0, 0, 0])},
                   np.where(GREY == GREY[0, 0], 255, GREY)),
    "trns RGB.png": (Image.fromarray(RGB), {"transparency": tuple(RGB[0, 0].tolist())}, np.where(HIDDEN, 255, RGB)),
    "trns P.png": (palette, {"transparency": palette.getpixel((0, 0))},
                   np.where(HIDDEN, 255, np.asarray(palette.convert("RGB")))),
    "half trns P.png": (palette, {"transparency": bytes([128] * 24)},
                        composited(np.asarray(palette.convert("RGB")), np.full((6, 4, 1), 128))),
    "16 bits.png": (Image.fromarray((RAMP * 65535).astype(np.uint16)), {}, RAMP[..., None] * 255),
    "trns 16 bits.png": (Image.fromarray((RAMP * 65535).astype(np.uint16)), {"transparency": 0},
                         np.where(RAMP == 0, 255, RAMP * 255)[..., None]),
    "32 bits.tiff": (Image.fromarray((RAMP.astype(float) * (2**31 - 1)).astype(np.int32)), {}, RAMP[..., None] * 255),
    "negative.tiff": (Image.fromarray(np.where(RAMP == 0, -5, RAMP * 65535).astype(np.int32)), {},
                      RAMP[..., None] * 255),
    "white is zero.tiff": (Image.fromarray((RAMP * 65535).astype(np.uint16)), {"tiffinfo": {262: 0}},
                           255 - RAMP[..., None] * 255),
    "lab.tiff": (ImageCms.profileToProfile(gray, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB"), {},
                 np.asarray(gray)),
    "sRGB.png": (Image.fromarray(RGB), {"icc_profile": SRGB.tobytes()}, RGB),
    "half sRGB.png": (rgba, {"icc_profile": SRGB.tobytes()}, composited(RGB, ALPHA)),
    "damaged profile.png": (Image.fromarray(RGB), {"icc_profile": b"x" * 200}, RGB),
    "profile.png": (Image.fromarray(RGB), {"icc_profile": SWAPPED}, RGB[..., [2, 1, 0]]),
    "grey profile.png": (Image.fromarray(GREY[..., 0]), {"icc_profile": GREY_PROFILE}, LIGHT),
    "half grey profile.png": (la, {"icc_profile": GREY_PROFILE}, composited(LIGHT, ALPHA)),
    "16 bits grey profile.png": (Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), {"icc_profile": GREY_PROFILE},
                                 LIGHT),
    "float.tiff": (Image.fromarray(RAMP), {}, RAMP[..., None] * 255),
    "float 255.tiff": (Image.fromarray(RAMP * 255), {}, RAMP[..., None] * 255),
    "nan.tiff": (Image.fromarray(np.where(RAMP == 0, np.nan, RAMP)), {}, RAMP[..., None] * 255),
    "infinite.tiff": (Image.fromarray(np.where(RAMP == 1, np.inf, RAMP)), {}, RAMP[..., None] * 255),
    "float 1e9.tiff": (Image.fromarray(RAMP * np.float32(1e9)), {}, RAMP[..., None] * 255),
    "cmyk.jpg": (Image.new("CMYK", (4, 6), (0, 255, 255, 0)), {}, np.asarray(red)),
    "animated.gif": (red, {"save_all": True, "append_images": [Image.new("RGB", (4, 6))]}, np.asarray(red)),
    "animated.webp": (red, {"save_all": True, "append_images": [Image.new("RGB", (4, 6))], "lossless": True},
                      np.asarray(red))}


@pytest.mark.parametrize("name", SHOWN)
def test_images_are_read_as_a_viewer_shows_them(name, tmp_path):
    image, options, shown = SHOWN[name]
    image.save(tmp_path / name, **options)
    ours = np.asarray(open_image(tmp_path / name), float)
    assert ours.shape[:2] == shown.shape[:2] and abs(ours - shown).max() <= 2


def png(bits, kind, rows, *chunks):
    """A PNG of 4×6 pixels that Pillow does not write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, data = struct.pack(">IIBBBBB", 4, 6, bits, kind, 0, 0, 0), zlib.compress(b"".join(b"\0" + x for x in rows))
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*some) for some in chunks)


# Files that Pillow does not write, of RGB or of what follows from it.
ROWS = [row.tobytes() for row in RGB]
GIF = io.BytesIO()
palette.save(GIF, "GIF")
# A frame at (2, 1) of 8×9 pixels.
SMALL, place = bytearray(GIF.getvalue()), GIF.getvalue().index(b"\x2c\0\0\0\0\4\0\6\0")
SMALL[6:10], SMALL[place + 1:place + 5] = struct.pack("<HH", 8, 9), struct.pack("<HH", 2, 1)
ODD_EXIF = b"II*\0" + struct.pack("<IHHHIHHHHIII", 8, 2, 0x112, 3, 1, 6, 0, 0x100, 2, 4, 0x636261, 0)  # a width "abc"
TWELVE = b"II*\0" + struct.pack("<I", 44) + bytes.fromhex("000555aaafff") * 6 + struct.pack("<H", 9) + b"".join(
    struct.pack("<HHII", tag, 4, 1, value) for tag, value in (
        (256, 4), (257, 6), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 6), (279, 36))) + bytes(4)
NIBBLES = np.arange(24).reshape(6, 4) % 16
WRITTEN = {
    "damaged EXIF": (png(8, 2, ROWS, (b"eXIf", b"hello")), RGB),
    "EXIF of odd types": (png(8, 2, ROWS, (b"eXIf", ODD_EXIF)), ORIENTED[6](RGB)),
    "EXIF that is no hexadecimal": (png(8, 2, ROWS, (b"tEXt", b"Raw profile type exif\0\n\n\nx")), RGB),
    "gamma": (png(8, 2, ROWS, (b"gAMA", struct.pack(">I", 10**5))), 255 * (RGB / 255) ** (1 / 2.2)),
    "gamma, 16 bits of grey": (png(16, 0, [np.repeat(row, 2).tobytes() for row in GREY[..., 0]],
                                   (b"gAMA", struct.pack(">I", 10**5))),
                               np.repeat(255 * (GREY / 255) ** (1 / 2.2), 3, axis=2)),
    "gamma of a screen": (png(8, 2, ROWS, (b"gAMA", struct.pack(">I", 10**5)), (b"sRGB", b"\0")), RGB),
    "small frame of a GIF": (SMALL, np.pad(np.asarray(palette.convert("RGB")), ((1, 2), (2, 2), (0, 0)),
                                           constant_values=255)),
    "12 bits": (TWELVE, np.broadcast_to(np.array([0, 85, 170, 255])[:, None], (6, 4, 3))),
    "16 bits a color": (png(16, 2, [row.astype(">u2").tobytes() for row in RGB.astype(int) * 257]), RGB),
    "4 bits of grey, one of them transparent": (
        png(4, 0, [bytes((a << 4 | b, c << 4 | d)) for a, b, c, d in NIBBLES.tolist()], (b"tRNS", b"\0\5")),
        np.repeat(np.where(NIBBLES == 5, 255, NIBBLES * 17)[..., None], 3, axis=2))}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_that_pillow_does_not_write(name):
    data, shown = WRITTEN[name]
    ours = np.asarray(open_image(io.BytesIO(data)), float)
    assert ours.shape == shown.shape and abs(ours - shown).max() <= 0.5


def test_a_jpeg_of_very_many_scans_is_not_opened(tmp_path):
    image = io.BytesIO()
    Image.new("L", (2**11, 2**11)).save(image, "JPEG", progressive=True)
    data = image.getvalue()
    (tmp_path / "x.jpg").write_bytes(data[:-2] + data[data.rindex(b"\xff\xda"):-2] * 300 + data[-2:])
    with pytest.raises(ValueError, match="at most 256 scans, got 30"):  # each takes time
        open_image(tmp_path / "x.jpg")


def test_files_that_start_a_program_or_fill_the_memory_are_not_opened(tmp_path):
    (tmp_path / "0000.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UnidentifiedImageError):  # Pillow would start Ghostscript
        open_image(tmp_path / "0000.png")
    Image.new("1", (2**13 + 1, 2**13)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="at most 67108864 pixels, got 8193 × 8192"):
        open_image(tmp_path / "large.png")
