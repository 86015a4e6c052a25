"""One picture of every kind as RGB, and the comparison of many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saccade.learn.pictures import check_picture, find_near_duplicates, read_image


def test_exif_rotation(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    left_red = Image.new("RGB", (40, 20), "blue")
    left_red.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    left_red.save(path, exif=exif, quality=95)
    image = read_image(path)
    assert image.size == (20, 40)
    top, bottom = image.getpixel((10, 5)), image.getpixel((10, 35))
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]  # type: ignore[index]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0] = (10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = [[[10, 20, 30], [255] * 3], [[127] * 3, [255] * 3]]
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png")), expected)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "p.png")).tolist() == [[[255] * 3, [200, 100, 50]], [[200, 100, 50]] * 2]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129], [257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.asarray(image)[:, :, 0].tolist() == [[0, 0, 1], [1, 128, 255]]
    assert check_picture(tmp_path / name).deep


def test_other_modes(tmp_path: Path) -> None:
    for mode, colour, expected in (("L", 100, (100,) * 3), ("1", 1, (255,) * 3), ("LA", (100, 255), (100,) * 3),
                                   ("CMYK", (0, 255, 255, 0), (255, 0, 0))):
        Image.new(mode, (3, 3), colour).save(tmp_path / f"{mode}.tif")
        assert read_image(tmp_path / f"{mode}.tif").getpixel((1, 1)) == expected
    Image.new("F", (3, 3), 0.5).save(tmp_path / "F.tif")
    assert check_picture(tmp_path / "F.tif").problem.startswith("pixels are 32-bit floats")
    Image.fromarray(np.full((3, 3), 70000, np.int32)).save(tmp_path / "I.tif")
    assert check_picture(tmp_path / "I.tif").problem == "pixels exceed 16 bits; save it with 8 or 16 bits"


def test_near_duplicates_need_the_same_pixels_and_colours() -> None:
    generator = np.random.default_rng(0)
    known = generator.integers(0, 256, (12, 8, 9, 3), dtype=np.uint8)
    held_out = known[[3, 7, 5]].copy()
    held_out[0] = np.clip(held_out[0].astype(int) + 3, 0, 255)  # brighter by three levels
    held_out[1] = held_out[1, :, ::-1]  # mirrored: another picture
    assert find_near_duplicates(known, held_out) == [(0, 3), (2, 5)]
    red, green = (np.full((1, 8, 9, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 200, 0)))
    assert find_near_duplicates(red, green) == []  # the same hash, another colour
