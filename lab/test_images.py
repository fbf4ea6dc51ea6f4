"""Images are read as a viewer shows them, and outputs replace files alone. The kinds of ../shared/cases are made here."""

import os

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from common import UserError, atomic
from conftest import SHARED
from formats.images import open_image


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    halves = Image.new("RGB", (8, 8), "blue")
    halves.paste("red", (0, 0, 4, 8))  # red at the left; orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    halves.save(tmp_path / "exif.png", exif=exif)
    shown = open_image(tmp_path / "exif.png")
    assert shown.getpixel((4, 0)) == (255, 0, 0) and shown.getpixel((4, 7)) == (0, 0, 255)

    red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    red.putpixel((0, 0), (0, 128, 0, 255))
    red.putpixel((1, 0), (0, 0, 0, 128))
    red.save(tmp_path / "rgba.png")
    red.quantize().save(tmp_path / "palette.png")
    red.convert("LA").save(tmp_path / "la.png")
    for name in ("rgba.png", "palette.png", "la.png"):
        shown = open_image(tmp_path / name)
        assert shown.mode == "RGB" and shown.getpixel((3, 3)) == (255, 255, 255)
    assert open_image(tmp_path / "rgba.png").getpixel((0, 0)) == (0, 128, 0)
    assert abs(open_image(tmp_path / "rgba.png").getpixel((1, 0))[0] - 127) <= 1
    Image.new("L", (4, 4), 7).save(tmp_path / "trns.png", transparency=7)
    assert open_image(tmp_path / "trns.png").getpixel((0, 0)) == (255, 255, 255)

    ramp = np.linspace(0, 1, 16).reshape(4, 4)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    for name in ("16.png", "float.tiff"):
        assert abs(np.asarray(open_image(tmp_path / name), int)[..., 0] - ramp * 255).max() <= 1
    (tmp_path / "0000.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UnidentifiedImageError):  # Pillow would start Ghostscript
        open_image(tmp_path / "0000.png")


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="no ../shared/cases")
def test_shared_cases_are_read_as_a_viewer_shows_them():
    exif, rgba, palette, grey = (open_image(SHARED / "cases" / name) for name in (
        "exif-6.jpg", "rgba.png", "palette-transparent.png", "grey16.png"))
    width, height = exif.size
    assert exif.getpixel((width // 2, 1))[0] > 200 and exif.getpixel((width // 2, height - 2))[2] > 200
    assert rgba.getpixel((0, 0)) == palette.getpixel((0, 0)) == (255, 255, 255)
    assert 0.4 < np.asarray(grey).mean() / 255 < 0.6


def test_output_never_replaces_what_is_no_regular_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("folder.png", "fifo.png"):
        with pytest.raises(UserError, match="expected a regular file"), atomic(tmp_path / name) as temporary:
            temporary.write_text("x")
    assert (tmp_path / "folder.png").is_dir() and (tmp_path / "fifo.png").is_fifo()
