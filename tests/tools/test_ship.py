"""`best/`: complete, true to the model, predicting without torch and without us, never half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import saccade
from saccade.core.origin import Origin
from saccade.learn.data import open_images
from saccade.learn.pictures import read_image
from saccade.learn.transforms import evaluation_transform, normalise
from saccade.tools import ship as room
from saccade.tools.ship import HINT, Product, Shipped, ship

CLASSES = ["cat & dog", "<owl>", "zèbre"]
SIDE = 16
WRITTEN = {"MODEL_CARD.md", "labels.json", "model.safetensors", "preprocess.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of all the kinds that come along, in two classes."""
    folder, random = tmp_path_factory.mktemp("ship"), np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (7, 9, 3)).astype(np.uint8)).resize((61, 37))
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = noise.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(noise.size))
    for label in ("a", "b"):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(6):
            noise.rotate(30 * number).save(folder / "photos" / label / f"{number}.png")
    pictures = folder / "pictures"
    pictures.mkdir()
    noise.save(pictures / "odd.png")
    noise.crop((0, 0, 9, 37)).save(pictures / "narrow.jpg")
    noise.save(pictures / "turned.jpg", exif=turned)
    noise.convert("L").save(pictures / "gray.png")
    noise.quantize(7).save(pictures / "palette.gif")
    noise.resize((SIDE, SIDE)).save(pictures / "exact.webp", lossless=True)
    noise.convert("CMYK").save(pictures / "cmyk.tif")
    clear.save(pictures / "alpha.png")
    clear.convert("LA").save(pictures / "alpha gray.png")
    Image.fromarray(np.asarray(noise.convert("L")).astype(np.uint16) * 257).save(pictures / "deep.png")
    return folder


@pytest.fixture(scope="module")
def product(folder: Path) -> Product:
    torch.manual_seed(0)
    model = saccade.create_model("poolformer_nano", num_classes=3, img_size=SIDE).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)  # apart from what an initialisation makes equal
    return Product(
        name="poolformer_nano", model=model, code="model = saccade.create_model('poolformer_nano', num_classes=3)",
        paper="PoolFormer", classes=CLASSES, img_size=SIDE, origin=Origin(), training="1 epoch",
        caution="One training.", data={"name": "photos", "counts": {"train": 8, "val": 2, "test": 2},
                                       "notes": ["a note"], "fingerprint": "f9"},
        metrics={"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def shipped(folder: Path, product: Product) -> Shipped:
    return ship(product, folder / "best", open_images(folder / "photos").test)


def chances(product: Product, path: Path) -> dict[str, float]:
    """What the Python model says of a picture, as `saccade predict` asks it."""
    square = normalise(evaluation_transform(SIDE)(read_image(path)), product.mean, product.std)
    with torch.no_grad():
        found = product.model(square[None])[0].softmax(-1).tolist()
    return dict(zip(CLASSES, found, strict=True))


def test_predict_alone_gives_the_answers_of_the_model(folder: Path, product: Product, shipped: Shipped) -> None:
    """Run where torch, torchvision and saccade cannot be imported, on each kind of picture."""
    stubs = folder / "stubs"
    for name in ("torch", "torchvision", "saccade", "timm"):
        (stubs / name).mkdir(parents=True)
        (stubs / name / "__init__.py").write_text("raise ImportError('not here')")
    pictures = sorted((folder / "pictures").iterdir())
    done = subprocess.run([sys.executable, folder / "best" / "predict.py", *pictures], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(stubs), "PYTHONUTF8": "1"}, cwd=stubs, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(pictures) == 10
    for path, line in zip(pictures, lines, strict=True):
        assert line.startswith(f"{path} ")
        found, wanted = json.loads(line.removeprefix(f"{path} ")), chances(product, path)
        assert found == pytest.approx(wanted, abs=1e-4), path.name
        assert list(found) == sorted(wanted, key=lambda name: -wanted[name])
    assert len({line.partition(" {")[2] for line in lines}) > 5  # the pictures are not all the same to it


def test_program_without_a_picture_says_how_it_is_called(folder: Path, shipped: Shipped) -> None:
    done = subprocess.run([sys.executable, folder / "best" / "predict.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "predict.py PICTURE..." in done.stderr


def test_folder_is_complete_and_parity_is_measured(folder: Path, product: Product, shipped: Shipped) -> None:
    best = folder / "best"
    assert {path.name for path in best.iterdir()} == WRITTEN | {"model.onnx", "predict.py"}
    assert shipped.parity is not None and shipped.parity.scores < 1e-5 and shipped.parity.chances < 1e-5
    assert shipped.parity.pictures == shipped.parity.agree == len(open_images(folder / "photos").test)
    assert json.loads((best / "labels.json").read_text("utf-8")) == CLASSES
    look = json.loads((best / "preprocess.json").read_text("utf-8"))
    assert (look["img_size"], look["mean"], look["std"]) == (SIDE, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    state = load_file(best / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in product.model.state_dict().items())
    assert saccade.load(saccade.create_model("poolformer_nano", num_classes=3), best).left == []
    assert shipped.lines(best)[0].startswith(f"{best} holds poolformer_nano to ship; on ")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_card_tells_everything(folder: Path, shipped: Shipped) -> None:
    card = (folder / "best" / "MODEL_CARD.md").read_text("utf-8")
    for said in ("# poolformer_nano for photos", "random weights", "8 to train, 2 to validate, 2 to test",
                 "25.0 % to 75.0 %", "mean 0.4, 0.5, 0.6", "a note", "onnxruntime, one picture", "One training.",
                 f"saccade {saccade.__version__}"):
        assert said in card
    assert "Mind the licence" not in card and "{{" not in card
    names: dict[str, Any] = {}
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("model.safetensors", str(folder / "best" / "model.safetensors")), names)
    assert not names["model"].training


@pytest.mark.parametrize(("licence", "said"), [
    ("CC-BY-NC-4.0", "CC-BY-NC-4.0, which forbids commercial use"), ("unknown", "of unknown licence"),
    ("GPL-3.0", "GPL-3.0, which is not a permissive one"), ("apache-2.0", ""), ("MIT", ""), ("", ""),
])
def test_licence_of_starting_weights_is_minded(licence: str, said: str) -> None:
    warning = Origin("theirs.pth", licence=licence).warning
    assert said in warning and bool(warning) == bool(said) and "\n" not in warning


def test_warning_stands_in_the_card_and_on_the_terminal(
        folder: Path, product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the extra `export` all else is there, with one line on what it would add."""
    monkeypatch.setattr(room, "has_onnx", lambda: False)
    found = ship(replace(product, origin=Origin("theirs.pth", "ImageNet-22K", "unknown")), tmp_path / "best",
                 open_images(folder / "photos").test)
    card = (tmp_path / "best" / "MODEL_CARD.md").read_text("utf-8")
    assert {path.name for path in (tmp_path / "best").iterdir()} == WRITTEN
    assert "**Mind the licence**: the starting weights (theirs.pth)" in card and "ImageNet-22K" in card
    assert 'pip install "saccade[export]"' in card and "onnxruntime" not in card
    lines = found.lines(tmp_path / "best")
    assert lines[0].endswith(HINT) and lines[1].startswith("warning: the starting weights (theirs.pth)")


def test_model_that_cannot_be_exported_ships_without_a_graph(folder: Path, product: Product, tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if float(image.mean()) > 1e9:
                raise ValueError
            return self.head(image.mean((2, 3)))

    found = ship(replace(product, model=Reads()), tmp_path / "best", open_images(folder / "photos").test)
    assert found.parity is None and found.missing.startswith("model.onnx and predict.py are missing: ")
    assert {path.name for path in (tmp_path / "best").iterdir()} == WRITTEN
    assert found.missing in (tmp_path / "best" / "MODEL_CARD.md").read_text("utf-8")


def test_graph_of_other_weights_is_not_shipped(
        folder: Path, product: Product, shipped: Shipped, tmp_path: Path) -> None:
    other = saccade.create_model("poolformer_nano", num_classes=3, img_size=SIDE)
    found = ship(replace(product, model=other), tmp_path / "best", open_images(folder / "photos").test,
                 graph=folder / "best" / "model.onnx")
    assert found.parity is None and "onnxruntime differs from PyTorch by" in found.missing


def test_failure_leaves_what_was_there(
        folder: Path, product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "kept").write_text("")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(room, "has_onnx", lambda: False)
    monkeypatch.setattr(room, "write_safetensors", full)
    with pytest.raises(OSError, match="no space"):
        ship(product, tmp_path / "best", open_images(folder / "photos").test)
    assert [path.name for path in tmp_path.rglob("*")] == ["best", "kept"]
    monkeypatch.undo()
    monkeypatch.setattr(room, "has_onnx", lambda: False)
    ship(product, tmp_path / "best", open_images(folder / "photos").test)
    assert {path.name for path in (tmp_path / "best").iterdir()} == WRITTEN and len(list(tmp_path.iterdir())) == 1
