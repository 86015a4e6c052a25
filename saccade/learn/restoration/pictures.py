"""A picture file as it is, and one written like it: 8 or 16 bits, gray or colour, alpha, EXIF, colour profile.

Pillow reads and writes all files. Where it would keep only the upper bytes of 16-bit colours, `deep` steps in.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from saccade.core.errors import SaccadeError
from saccade.core.files import fill_whole
from saccade.learn.pictures import SUFFIXES
from saccade.learn.restoration import deep

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
PLAIN = {"1": "L", "YCbCr": "RGB", "LA": "LA", "La": "LA", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB"}
STRUCTURE = {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325,
             338, 339, 347, 530, 531, 532, 700, 34675}  # tags of a TIFF that say how its pixels lie, not what they show


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, 1 or 3) and alpha (H, W), both uint8 or both uint16, with the EXIF and profile of the file.

    Pixels lie as in the file: an orientation tag stays in the EXIF and still holds.
    """

    pixels: NDArray[Any]
    alpha: NDArray[Any] | None = None
    exif: bytes = b""
    profile: bytes = b""

    @property
    def top(self) -> int:
        """The value of full brightness, 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)

    @property
    def kind(self) -> str:
        """In words, as in "16-bit RGB with alpha"."""
        colour = "gray" if self.pixels.shape[2] == 1 else "RGB"
        return f"{8 * self.pixels.dtype.itemsize}-bit {colour}{'' if self.alpha is None else ' with alpha'}"


def read_picture(path: Path) -> Picture:
    """The picture in a PNG, JPEG, WebP or TIFF file.

    Raises SaccadeError, one line that begins with the path, where it is missing, corrupt, animated or of another kind.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large is what tiles are for
            return _picture(path, image)
    except SaccadeError as error:
        raise SaccadeError(f"{path}: {error}") from error
    except Exception as error:  # decoders of broken files raise whatever they like
        raise SaccadeError(f"{path}: {_reason(error)}") from error


def _picture(path: Path, image: ImageFile.ImageFile) -> Picture:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG with a preview behind it, as telephones make them
        raise SaccadeError(f"it holds {frames} frames; save the one to restore as a file of its own")
    profile = image.info.get("icc_profile") or b""
    pixels = deep.read(path, image)
    if pixels is None:
        pixels = _shallow(image)
    colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))
    alpha = np.ascontiguousarray(pixels[..., colours]) if pixels.shape[2] > colours else None
    return Picture(np.ascontiguousarray(pixels[..., :colours]), alpha, _exif(image), profile)


def _shallow(image: Image.Image) -> NDArray[Any]:
    """(H, W, C) uint8, or uint16 of a gray picture."""
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is what Pillow makes of some 16-bit files
        gray = np.asarray(image)
        if gray.dtype.itemsize > 2 and (gray.min() < 0 or gray.max() > 65535):
            raise SaccadeError("its pixels exceed 16 bits; save it with 8 or 16")
        return gray.astype(np.uint16)[..., None]
    mode = PLAIN.get(image.mode, image.mode)
    if image.has_transparency_data and mode in ("P", "L", "RGB"):  # one colour, or entries of the palette
        mode = "LA" if mode == "L" else "RGBA"
    elif mode == "P":
        mode = "RGB"
    if mode not in ("L", "LA", "RGB", "RGBA"):
        raise SaccadeError(f"its colours are {mode}; save it as gray or RGB with 8 or 16 bits")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _exif(image: Image.Image) -> bytes:
    """The EXIF block; of a TIFF, whose tags stand among those of its layout, what remains without these.

    Pillow turns a TIFF as its orientation says, and takes that tag away.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.info.get("exif") or b""
    exif = image.getexif()
    for sub in (0x8769, 0x8825):
        exif.get_ifd(sub)
    for tag in STRUCTURE & set(exif):
        del exif[tag]
    return exif.tobytes() if len(exif) else b""


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP or TIFF file, or broken from its start"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it; cut it into parts"
    message = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
    if isinstance(error, Image.DecompressionBombError):
        return f"too large ({message}); cut it into parts"
    return f"cannot be decoded ({message})"


def check_holds(path: Path, picture: Picture, scale: int = 1) -> None:
    """Raise SaccadeError where a file of this name cannot hold such a picture, `scale` times as large."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SaccadeError(f"{path}: the name ends with {suffix or 'no kind'}; choose one of {', '.join(SUFFIXES)}")
    sixteen = picture.pixels.dtype == np.uint16
    jpeg = suffix in (".jpg", ".jpeg")
    if (sixteen and (jpeg or suffix == ".webp")) or (jpeg and picture.alpha is not None):
        raise SaccadeError(f"{path}: {suffix} cannot hold {picture.kind}; choose .png or .tif")
    longest = max(picture.pixels.shape[:2]) * scale
    if longest > (limit := 16383 if suffix == ".webp" else 65500) and (jpeg or suffix == ".webp"):
        raise SaccadeError(f"{path}: {suffix} holds at most {limit} pixels a side, not {longest}; choose .png or .tif")


def write_picture(path: Path, picture: Picture) -> None:
    """Write a PNG, JPEG (quality 95, full colour), WebP (lossless) or TIFF by its name, as a whole or not at all.

    Raises SaccadeError where the kind of file cannot hold the picture; OSError (a full disk) leaves what was there.
    """
    check_holds(path, picture)
    suffix = path.suffix.lower()
    parts = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha[..., None]]
    pixels = np.concatenate(parts, -1) if len(parts) > 1 else parts[0]
    tiff = suffix in (".tif", ".tiff")
    if tiff or picture.pixels.dtype == np.uint16:
        writer = deep.write_tiff if tiff else deep.write_png
        fill_whole(path, lambda part: writer(part, pixels, picture.exif, picture.profile))
        return
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    options: dict[str, Any] = {"exif": picture.exif} if picture.exif else {}
    if picture.profile:
        options["icc_profile"] = picture.profile
    own: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": dict(lossless=True, exact=True),
                                      "JPEG": dict(quality=95, subsampling=0)}
    kind = {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
    fill_whole(path, lambda part: image.save(part, kind, **own[kind], **options))
