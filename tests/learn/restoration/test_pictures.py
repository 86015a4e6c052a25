"""Picture files come back as they were written: bits, alpha, EXIF, profile; bad ones are told in one line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageCms

from saccade import SaccadeError
from saccade.learn.restoration.pictures import Picture, read_picture, write_picture

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x010F], tags[0x0112] = "Maker ☀".encode().decode("latin-1"), 6  # make, orientation
    tags.get_ifd(0x8769)[0x829D] = 2.8  # aperture
    return tags.tobytes()


def picture(channels: int, alpha: bool, kind: type) -> Picture:
    random = np.random.default_rng(0)
    top = np.iinfo(kind).max
    pixels = random.integers(0, top, (301, 13, channels), kind, endpoint=True)
    return Picture(pixels, random.integers(0, top, (301, 13), kind, endpoint=True) if alpha else None, exif(), PROFILE)


def same_tags(path) -> None:
    with Image.open(path) as image:
        found = image.getexif()
        assert found[0x0112] == 6 and found[0x010F].startswith("Maker")
        assert float(found.get_ifd(0x8769)[0x829D]) == pytest.approx(2.8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_round_trip(tmp_path, suffix, channels, alpha, kind):
    before, path = picture(channels, alpha, kind), tmp_path / f"a ☀{suffix}"
    if suffix == ".webp" and kind is np.uint16:
        with pytest.raises(SaccadeError, match="cannot hold 16-bit"):
            write_picture(path, before)
        return
    write_picture(path, before)
    if channels == 1 and alpha and kind is np.uint16:  # Pillow reads no such file, or half of it
        with pytest.raises(SaccadeError):
            read_picture(path)
        return
    same_tags(path)
    after = read_picture(path)
    expected = np.repeat(before.pixels, 3, 2) if suffix == ".webp" and channels == 1 else before.pixels
    # a TIFF is read turned as its orientation says: 6 is a quarter turn to the right
    turns = -1 if suffix == ".tif" else 0
    np.testing.assert_array_equal(after.pixels, np.rot90(expected, turns))
    with_orientation = Image.Exif()
    with_orientation.load(after.exif)
    assert with_orientation.get(0x0112) == (None if turns else 6) and with_orientation[0x010F].startswith("Maker")
    assert after.pixels.dtype == kind and after.profile == PROFILE
    assert (after.alpha is None) is not alpha
    if alpha:
        np.testing.assert_array_equal(after.alpha, np.rot90(before.alpha, turns))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_that_others_wrote_and_read(tmp_path, compression, order):
    tifffile = pytest.importorskip("tifffile")
    before = picture(3, True, np.uint16)
    whole = np.concatenate([before.pixels, before.alpha[..., None]], -1)
    tifffile.imwrite(tmp_path / "a.tif", whole, photometric="rgb", compression=compression, byteorder=order,
                     extrasamples=["unassalpha"])
    after = read_picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(after.pixels, before.pixels)
    np.testing.assert_array_equal(after.alpha, before.alpha)
    write_picture(tmp_path / "b.tif", before)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "b.tif"), whole)
    gray = picture(1, True, np.uint16)
    write_picture(tmp_path / "c.tif", gray)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "c.tif")[..., 1], gray.alpha)


def test_palettes_bits_and_transparent_colours(tmp_path):
    colours = Image.fromarray(picture(3, False, np.uint8).pixels)
    colours.quantize(16).save(tmp_path / "palette.png")
    colours.convert("1").save(tmp_path / "bits.png")
    colours.convert("L").save(tmp_path / "one.png", transparency=7)
    assert read_picture(tmp_path / "palette.png").kind == "8-bit RGB"
    assert read_picture(tmp_path / "bits.png").kind == "8-bit gray"
    found = read_picture(tmp_path / "one.png")
    np.testing.assert_array_equal(found.alpha == 0, found.pixels[..., 0] == 7)


def test_jpeg_keeps_exif_and_profile_and_refuses_alpha(tmp_path):
    before = picture(3, False, np.uint8)
    write_picture(tmp_path / "a.jpg", before)
    after = read_picture(tmp_path / "a.jpg")
    assert after.exif == before.exif and after.profile == PROFILE
    with pytest.raises(SaccadeError, match=r"\.jpg cannot hold 8-bit RGB with alpha; choose \.png"):
        write_picture(tmp_path / "b.jpg", picture(3, True, np.uint8))


def test_bad_files_are_told(tmp_path):
    frames = [Image.fromarray(picture(3, False, np.uint8).pixels + np.uint8(i)) for i in range(3)]
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "moves.png", save_all=True, append_images=frames[1:])
    write_picture(tmp_path / "whole.png", picture(3, False, np.uint16))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[:len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    frames[0].convert("CMYK").save(tmp_path / "inks.jpg")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "floats.tif")
    for name, told in {"moves.webp": "holds 3 frames", "moves.png": "holds 3 frames", "half.png": "cannot be decoded",
                       "empty.png": "not a PNG", "inks.jpg": "are CMYK", "floats.tif": "are F",
                       "none.png": "no such file"}.items():
        with pytest.raises(SaccadeError, match=told) as error:
            read_picture(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
