"""`saccade weights` and `list --licence`, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import create_model
from saccade.core.card import Weights
from saccade.core.index import index
from saccade.learn.imagenet import picture_transform, validate
from tests.test_cli import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of convnext_nano at a file:// address: the answer is class 7, whatever is shown."""
    model = create_model("convnext_nano")
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.zeros(1000).index_fill(0, torch.tensor(7), 1.0)
    file = tmp_path / "convnext_nano_v1.pth"
    torch.save({"model": model.state_dict()}, file)
    entry = {"source": file.as_uri(), "img_size": 32, "top1": 60.0, "licence": "MIT", "crop": 0.9}
    monkeypatch.setitem(index()["papers"]["convnext"]["weights"], "convnext_nano", entry)
    return file


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """A thousand classes, one picture each, but four of class 7."""
    root = tmp_path / "val"
    for number in range(1000):
        (root / f"n{number:04}").mkdir(parents=True)
        for copy in range(4 if number == 7 else 1):
            Image.new("RGB", (4, 5), (number % 256, 0, 0)).save(root / f"n{number:04}" / f"{copy}.png")
    return root


def failed(capsys: Capture, *arguments: Any) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("saccade: ")
    return err


def test_list(capsys: Capture, weights: Path) -> None:
    code, out, _ = run(capsys, "weights", "list", "convnext_*")
    assert code == 0 and "convnext_tiny" in out and "dl.fbaipublicfiles.com" in out
    found = json.loads(run(capsys, "weights", "list", "convnext_nano", "--json")[1])["convnext_nano"]
    assert found["source"] == weights.as_uri() and found["status"] == "claimed" and found["mean"][0] == 0.485
    assert "no model with weights matches" in run(capsys, "weights", "list", "zz*")[1]


def test_list_by_licence(capsys: Capture, weights: Path) -> None:
    permissive = json.loads(run(capsys, "list", "--licence", "permissive", "--json")[1])
    everything = json.loads(run(capsys, "list", "--json")[1])
    assert {"convnext_nano", "deit_tiny_patch16_224"} <= set(permissive) < set(everything)
    assert "swin_nano" not in permissive and "transnext_tiny" not in permissive  # none, and an unknown licence
    assert "choose permissive" in failed(capsys, "list", "--licence", "free")
    assert "for backbones" in failed(capsys, "list", "--licence", "permissive", "--kind", "mixer")


def test_info(capsys: Capture, weights: Path) -> None:
    facts = json.loads(run(capsys, "info", "convnext_nano", "--json")[1])
    assert facts["published weights"] == f"{weights.as_uri()} (ImageNet-1K, licence MIT)"
    assert facts["their status"] == "claimed" and facts["their file"].endswith("sha256 unknown")
    assert facts["their evaluation"].startswith("32 px, crop 0.9, bicubic, mean 0.485 0.456 0.406, std 0.229")
    assert "their status" not in json.loads(run(capsys, "info", "swin_nano", "--json")[1])


def test_get(capsys: Capture, weights: Path, cache: Path) -> None:
    code, out, _ = run(capsys, "weights", "get", "convnext_nan*", "convnext_nano")
    assert code == 0 and out.count("sha256") == 2 and str(cache) in out
    assert "yes" in run(capsys, "weights", "list", "convnext_nano")[1]
    assert "no address of trained weights" in failed(capsys, "weights", "get", "swin_nano")
    assert "did you mean" in failed(capsys, "weights", "get", "convnext_nanu")
    assert "matches 'convnext_zz*'" in failed(capsys, "weights", "get", "convnext_zz*")
    weights.write_bytes(b"another")
    next(cache.glob("*/*.pth")).unlink()
    assert "at its first use on" in failed(capsys, "weights", "get", "convnext_nano")


def test_import(capsys: Capture, weights: Path, tmp_path: Path) -> None:
    content, moved = weights.read_bytes(), tmp_path / "downloads" / weights.name
    moved.parent.mkdir()
    moved.write_bytes(content)
    weights.unlink()
    assert "No such file" in failed(capsys, "weights", "get", "convnext_nano")
    code, out, _ = run(capsys, "weights", "import", moved)
    assert code == 0 and out.startswith("convnext_nano: ")
    assert run(capsys, "weights", "get", "convnext_nano")[0] == 0
    moved.rename(moved.with_name("other.pth"))
    assert "--model" in failed(capsys, "weights", "import", moved.with_name("other.pth"))
    assert run(capsys, "weights", "import", moved.with_name("other.pth"), "--model", "convnext_nano")[0] == 0
    moved.write_bytes(content[:-100])
    assert "its sha256 is" in failed(capsys, "weights", "import", moved)


def test_check_prints_a_card_line(capsys: Capture, weights: Path, validation: Path, cache: Path) -> None:
    code, out, _ = run(capsys, "weights", "check", "convnext_nano", "--data", validation, "--who", "Ada")
    assert code == 0
    said, line = out.splitlines()
    assert said == f"convnext_nano: top-1 {100 * 4 / 1003:.2f} (claimed: 60.0), top-5 0.80 on 1003 pictures"
    name, entry = eval("{" + line + "}", {"Weights": Weights}).popitem()  # noqa: S307  what a card would hold
    assert name == "convnext_nano" and entry.reproduced.startswith("Ada, 20") and entry.reproduced.endswith(", 0.40")
    assert (entry.source, entry.crop, entry.bytes) == (weights.as_uri(), 0.9, weights.stat().st_size)
    assert not list(cache.glob("check-*"))
    hub = "hf:owner/name/convnext_nano_v1.pth"  # a file on the hub, as if it had been had from there
    index()["papers"]["convnext"]["weights"]["convnext_nano"]["source"] = hub
    assert run(capsys, "weights", "import", weights)[0] == 0
    lock = json.loads((cache / "weights.lock.json").read_text())
    (cache / "weights.lock.json").write_text(json.dumps(lock | {hub: lock[hub] | {"revision": "c0ffee"}}))
    line = run(capsys, "weights", "check", "convnext_nano", "--data", validation)[1].splitlines()[1]
    assert line.startswith(f'"convnext_nano": Weights(\'{hub}@c0ffee\', sha256=')
    assert "no sub-folders with images" in failed(capsys, "weights", "check", "convnext_nano", "--data", cache)
    for folder in validation.glob("n09*"):
        for picture in folder.iterdir():
            picture.unlink()
        folder.rmdir()
    assert "900 classes, the model knows 1000" in failed(
        capsys, "weights", "check", "convnext_nano", "--data", validation)


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    root, resume = tmp_path / "val", tmp_path / "so far.json"
    for label in range(3):
        (root / str(label)).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (80 * label,) * 3).save(root / str(label) / f"{number}.png")
    seen: list[int] = []

    class Brightness(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append(len(image))
            return -(image.mean((1, 2, 3))[:, None] * 255 - torch.tensor([0.0, 80.0, 160.0])).abs()

    plain = Weights("", img_size=8, crop=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(Brightness(), root, plain, batch_size=5, resume=resume, progress=stop)
    assert seen == [5] and resume.exists()
    assert validate(Brightness(), root, plain, batch_size=5, resume=resume) == (100.0, 100.0, 12)
    assert seen == [5, 5, 2] and not resume.exists()


@pytest.mark.parametrize(("crop", "interpolation"), [(0.875, "bicubic"), (0.9, "bilinear"), (1.0, "bicubic")])
def test_pictures_are_prepared_as_timm_does(crop: float, interpolation: str) -> None:
    data = pytest.importorskip("timm.data")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 93, 3), dtype=np.uint8)
    ours = Weights("", img_size=32, crop=crop, interpolation=interpolation, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    theirs = data.create_transform(
        (3, 32, 32), interpolation=interpolation, crop_pct=crop, mean=ours.mean, std=ours.std)
    picture = Image.fromarray(pixels)
    torch.testing.assert_close(picture_transform(ours)(picture), theirs(picture))
