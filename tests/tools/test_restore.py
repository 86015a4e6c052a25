"""`saccade restore`: what is kept, what is refused, and that nothing is lost when it stops midway."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import SaccadeError, create_model
from saccade.core.checkpoint import write_safetensors
from saccade.learn.restoration import pictures as files
from saccade.learn.restoration.pictures import Picture, read_picture, write_picture
from saccade.learn.restoration.restore import Tiles, restore_picture
from saccade.learn.restoration.tiling import Bicubic
from saccade.tools.restore import SETTINGS, open_restorer
from tests.test_cli import run

NAME = "hat_nano_x2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(0)
    write_safetensors(path, create_model(NAME).state_dict(), {})
    return path


def photograph(height=40, width=56, channels=3, kind=np.uint8) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] / 8
    planes = [np.sin(rows + k) * np.cos(columns * (k + 1)) for k in range(channels)]
    return ((np.stack(planes, -1) * 0.45 + 0.5) * np.iinfo(kind).max).astype(kind)


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "in"
    (source / "deeper").mkdir(parents=True)
    for name in ("a.png", "b ☀.jpg", "deeper/c.webp", "deeper/d.tif"):
        write_picture(source / name, Picture(photograph()))
    (source / "notes.txt").write_text("no picture")
    return source


def arguments(source, target, weights, *more):
    return ("restore", source, target, "--model", NAME, "--checkpoint", weights, "--tile", "32", "--overlap", "8",
            *more)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("alpha", [False, True])
def test_depth_colour_and_alpha(channels, kind, alpha):
    """The picture is what the network says of its numbers in [0, 1], rounded to its own depth."""
    torch.manual_seed(0)
    model = create_model(NAME).eval()
    pixels, top = photograph(20, 24, channels, kind), np.iinfo(kind).max
    mask = photograph(20, 24, 1, kind)[..., 0] // 2 + 1 if alpha else None
    made = restore_picture(model, Picture(pixels, mask, b"Exif\0\0II", b"profile"))
    assert made.pixels.dtype == kind and made.pixels.shape == (40, 48, channels)
    assert (made.exif, made.profile) == (b"Exif\0\0II", b"profile")
    image = torch.from_numpy(pixels.astype(np.float32) / top).movedim(-1, 0)[None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = model(image)[0].movedim(0, -1)
    if channels == 1:
        expected = expected.mean(-1, keepdim=True)
    expected = (expected.clamp(0, 1) * top).numpy()
    assert np.abs(made.pixels - expected).max() <= (0.51 if kind is np.uint8 else 1.5)
    if alpha:
        resized = Bicubic(2)(torch.from_numpy(mask.astype(np.float64))[None, None])[0, 0].clamp(0, top)
        assert np.abs(made.alpha - resized.numpy()).max() <= (0.51 if kind is np.uint8 else 1.5)
    else:
        assert made.alpha is None


def test_a_network_of_one_channel_sees_each_colour():
    pixels = photograph(9, 7)
    made = restore_picture(Bicubic(2, 1), Picture(pixels))
    np.testing.assert_array_equal(made.pixels, restore_picture(Bicubic(2, 3), Picture(pixels)).pixels)


@pytest.mark.parametrize("scale", [1, 2])
def test_what_alpha_hides_takes_no_part(scale):
    """Black or white under alpha 0: the visible result is the same, and its colours do not bleed in."""
    pixels = np.full((33, 47, 3), (200, 40, 90), np.uint8)
    alpha = np.zeros((33, 47), np.uint8)
    alpha[10:21, 20:30] = 255
    results = []
    for hidden in (0, 255):
        under = np.where(alpha[..., None] == 0, np.uint8(hidden), pixels)
        results.append(restore_picture(Bicubic(scale), Picture(under, alpha)))
    np.testing.assert_array_equal(results[0].pixels, results[1].pixels)
    assert (results[0].pixels == (200, 40, 90)).all()
    np.testing.assert_array_equal(results[0].alpha > 127, alpha.repeat(scale, 0).repeat(scale, 1) > 127)


def test_a_folder_is_resumed_and_kept(capsys, folder, weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    calls, write = [], files.fill_whole

    def stops_at_third(path, make):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, make)

    monkeypatch.setattr(files, "fill_whole", stops_at_third)
    code, _, error = run(capsys, *arguments(folder, out, weights))
    assert code == 2 and error.count("\n") == 1
    assert "c.webp could not be written (No space left on device)" in error and "goes on from here" in error
    monkeypatch.undo()
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != SETTINGS}
    assert {path.name for path in first} == {"a.png", "b ☀.jpg"}
    code, told, _ = run(capsys, *arguments(folder, out, weights))
    assert code == 0 and "2 of 4 were in" in told and "40x" not in told.replace("56x40", "")
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    assert names == ["a.png", "b ☀.jpg", "deeper/c.webp", "deeper/d.tif", SETTINGS]
    for path in out.rglob("*.*"):
        if path.name != SETTINGS:
            assert read_picture(path).pixels.shape == (80, 112, 3)
    code, _, error = run(capsys, *arguments(folder, out, weights, "--self-ensemble"))
    assert code == 2 and "self_ensemble is False there and True here" in error
    before = (out / "a.png").read_bytes()
    assert run(capsys, *arguments(folder, out, weights, "--self-ensemble", "--force"))[0] == 0
    assert (out / "a.png").read_bytes() != before
    assert json.loads((out / SETTINGS).read_text())["self_ensemble"] is True


def test_broken_pictures_do_not_stop_the_others(capsys, folder, weights, tmp_path):
    data = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(data[:len(data) // 2])
    code, told, error = run(capsys, *arguments(folder, tmp_path / "out", weights))
    assert code == 2 and "failed: " in told and "a.png: cannot be decoded" in told
    assert error.startswith("saccade: 1 of 4 pictures could not be restored") and error.count("\n") == 1
    assert len([path for path in (tmp_path / "out").rglob("*.*")]) == 4


def test_a_file_is_never_overwritten_unless_asked(capsys, folder, weights, tmp_path, monkeypatch):
    target = tmp_path / "big.png"
    target.write_bytes(b"precious")
    code, _, error = run(capsys, *arguments(folder / "a.png", target, weights))
    assert code == 2 and "is there already: --force overwrites it" in error and target.read_bytes() == b"precious"

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)  # the disk fills while the new one is written: the old one stays
    code, _, error = run(capsys, *arguments(folder / "a.png", target, weights, "--force"))
    assert code == 2 and "nothing was changed" in error and target.read_bytes() == b"precious"
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["big.png"]
    assert run(capsys, *arguments(folder / "a.png", target, weights, "--force"))[0] == 0
    assert read_picture(target).pixels.shape == (80, 112, 3)
    code, _, error = run(capsys, *arguments(folder / "a.png", folder / "a.png", weights, "--force"))
    assert code == 2 and "is the picture itself" in error


def test_exif_and_profile_are_kept(capsys, weights, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    write_picture(tmp_path / "a.jpg", Picture(photograph(), None, tags.tobytes(), b"a profile"))
    assert run(capsys, *arguments(tmp_path / "a.jpg", tmp_path / "b.jpg", weights))[0] == 0
    made = read_picture(tmp_path / "b.jpg")
    assert made.exif == tags.tobytes() and made.profile == b"a profile"


def test_a_picture_smaller_than_a_window(capsys, weights, tmp_path):
    for size in ((1, 1), (3, 5)):
        write_picture(tmp_path / "small.png", Picture(photograph(*size)))
        assert run(capsys, *arguments(tmp_path / "small.png", tmp_path / "made.png", weights, "--force"))[0] == 0
        assert read_picture(tmp_path / "made.png").pixels.shape == (2 * size[0], 2 * size[1], 3)


def test_bad_input_is_one_line(capsys, folder, weights, tmp_path):
    picture, out = folder / "a.png", tmp_path / "x.png"
    for told, line in {
        "is a checkpoint of hat_nano_x2, not of hat_nano_x4: give --model hat_nano_x2":
            ("restore", picture, out, "--model", "hat_nano_x4", "--checkpoint", weights),
        "swin_tiny does not restore pictures":
            ("restore", picture, out, "--model", "swin_tiny", "--checkpoint", weights),
        "w.safetensors: the checkpoint does not fit drct_x2|this is not a checkpoint of drct_x2":
            ("restore", picture, out, "--model", "drct_x2", "--checkpoint", weights),
        "tile=16 with overlap=12": arguments(picture, out, weights, "--tile", "16", "--overlap", "12"),
        "there is no such file or folder": arguments(tmp_path / "none", out, weights),
        "holds no picture": arguments(weights.parent, out, weights),
        "results of a folder need another folder": arguments(folder, folder, weights),
        "ends with .gif; choose one of .png": arguments(picture, tmp_path / "x.gif", weights),
    }.items():
        code, _, error = run(capsys, *line)
        assert code == 2 and error.count("\n") == 1
        assert any(part in error for part in told.split("|")), error
    assert not out.exists()


def test_a_network_that_cleans_in_tiles():
    """Scale 1, windows of 64: three tiles a row, alpha as it was."""
    torch.manual_seed(0)
    model = create_model("maxim_s1", dim=8, depth=2).eval()
    pixels = photograph(70, 190)
    mask = photograph(70, 190, 1)[..., 0]
    made = restore_picture(model, Picture(pixels, mask), Tiles(96, 32))
    assert made.pixels.shape == pixels.shape and made.alpha is mask


def test_too_little_memory_is_told(capsys, folder, weights, tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr("saccade.tools.restore.restore_picture", full)
    code, _, error = run(capsys, *arguments(folder / "a.png", tmp_path / "x.png", weights))
    assert code == 2 and "not enough memory for 56x40 pixels; give a smaller --tile than 32" in error


@pytest.mark.slow
def test_twelve_megapixels_within_four_gigabytes(tmp_path):
    """Read, enlarged fourfold to 192 megapixels with alpha, written; the network is one whose own memory is small."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from saccade.learn.restoration.pictures import read_picture, write_picture
        from saccade.learn.restoration.restore import restore_picture
        from saccade.learn.restoration.tiling import Bicubic
        folder = Path(sys.argv[1])
        write_picture(folder / "out.png", restore_picture(Bicubic(4), read_picture(folder / "in.png")))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
    """
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8).repeat(100, 0).repeat(100, 1)
    write_picture(tmp_path / "in.png", Picture(pixels[..., :3], pixels[..., 3]))
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 2**20
    with (tmp_path / "out.png").open("rb") as file:  # Pillow itself opens none so large without being told
        assert struct.unpack(">II", file.read(24)[16:]) == (16000, 12000)


def test_weights_that_give_no_numbers_are_told():
    torch.manual_seed(0)
    model = create_model(NAME).eval()
    torch.nn.init.constant_(model.last.bias, float("nan"))
    with pytest.raises(SaccadeError, match="not finite"):
        restore_picture(model, Picture(photograph()), Tiles(32, 8))


def test_open_restorer_reads_our_weights(weights):
    torch.manual_seed(0)
    fresh = create_model(NAME).eval()
    opened = open_restorer(NAME, weights).cpu()
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(opened(image), fresh(image))
