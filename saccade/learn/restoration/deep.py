"""Colours of 16 bits, for which Pillow has no picture: it reads the upper bytes alone, and writes none.

Its decoders understand the bytes in either order. So a file is decoded twice, as it is and with the bytes of each
sample taken for swapped: the "upper" bytes of the second are the lower ones.
"""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from saccade.core.errors import SaccadeError

SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
LEVEL = 3  # of compression: the next ones win a few percent for several times the time


def read(path: Path, image: ImageFile.ImageFile) -> NDArray[np.uint16] | None:
    """(H, W, 3 or 4) of an opened file of 16-bit colours; None of any other."""
    forms = {_form(tile.args) for tile in image.tile}
    deep = [form for form in forms if form.partition(";")[2] in ("16B", "16L", "16N")]
    if not deep or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    if len(forms) > 1 or deep[0][:-1] not in ("RGB;16", "RGBA;16"):
        raise SaccadeError(f"16-bit pixels of the form {sorted(forms)[0]}; save it as gray, RGB or RGBA")
    upper = np.asarray(image).astype(np.uint16)
    with Image.open(path) as again:
        assert isinstance(again, ImageFile.ImageFile)
        swapped = deep[0][:-1] + SWAPPED[deep[0][-1]]
        again.tile = [tile._replace(args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped)
                      for tile in again.tile]
        lower = np.asarray(again)
    upper <<= 8
    upper |= lower
    return upper


def _form(arguments: Any) -> str:
    return str(arguments if isinstance(arguments, str) else arguments[0] if arguments else "")


def write_png(path: Path, pixels: NDArray[np.uint16], exif: bytes, profile: bytes) -> None:
    """Write (H, W, 1 to 4) uint16 as PNG (W3C, third edition, 2025), each row less the one above it."""
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
        if profile:
            _chunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
        if exif:
            _chunk(file, b"eXIf", exif.removeprefix(b"Exif\0\0"))
        packer, above = zlib.compressobj(LEVEL), np.zeros(2 * width * channels, np.uint8)
        for top in range(0, height, 256):
            rows = pixels[top:top + 256].astype(">u2").reshape(-1, width * channels).view(np.uint8)
            less = np.concatenate([np.full((len(rows), 1), 2, np.uint8), rows - np.vstack([above[None], rows[:-1]])], 1)
            above = rows[-1]
            if data := packer.compress(less.tobytes()):
                _chunk(file, b"IDAT", data)
        _chunk(file, b"IDAT", packer.flush())
        _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))


def write_tiff(path: Path, pixels: NDArray[Any], exif: bytes, profile: bytes) -> None:
    """Write (H, W, 1 to 4) uint8 or uint16 as TIFF 6.0: one strip, little-endian, deflated.

    Also for 8 bits: Pillow compresses through libtiff, to which it cannot hand the inner tables of an EXIF block.
    """
    height, width, channels = pixels.shape
    data = zlib.compress(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(), LEVEL)
    known = Image.Exif()
    known.load(exif)
    tags = ImageFileDirectory_v2(prefix=b"II")
    for tag, value in known.items():
        tags[tag] = known.get_ifd(tag) if tag in (0x8769, 0x8825) else value
    tags[256], tags[257], tags[258], tags[259] = width, height, (8 * pixels.itemsize,) * channels, 8
    tags[262], tags[273], tags[277], tags[278] = 1 if channels < 3 else 2, 0, channels, height
    tags[279], tags[284] = len(data), 1
    if channels in (2, 4):
        tags[338] = 2  # alpha that the colours are not multiplied by
    if profile:
        tags.tagtype[34675] = 7
        tags[34675] = profile
    with path.open("wb") as file:
        tags.save(file)  # which moves the strip's offset, 0, behind the tags
        file.write(data)
