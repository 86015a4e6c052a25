"""`best/`: a trained classifier as it ships. Weights, an ONNX graph that was put beside the model on real pictures,
preprocessing, classes, a card that says what all this is and which licence binds it, and a short program without us."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from saccade.core.checkpoint import write_safetensors
from saccade.core.files import fill_folder_whole
from saccade.core.origin import Origin
from saccade.learn.data import Split
from saccade.learn.train import Recipe
from saccade.learn.transforms import some
from saccade.tools.contestants import reason
from saccade.tools.export import Parity, checked, export_square, has_onnx, open_session
from saccade.tools.measure import conditions, count_macs, race, summary
from saccade.tools.render import render
from saccade.tools.report_figures import digits, scaled

FOLDER = "best"
HINT = 'pip install "saccade[export]" and the same command again add model.onnx and predict.py'
PICTURES = 64  # of the test part, on which graph and model are compared
ROUNDS = 50  # of a latency


@dataclass(frozen=True)
class Product:
    """What is shipped, and what its card says of it.

    `code` is the Python that builds the model, `paper` what it is, `training` how it was trained, `caution` how the
    metrics ({name: {value, low, high}}) are to be read; `data` holds name, counts, notes and fingerprint.
    """

    name: str
    model: nn.Module
    code: str
    paper: str
    classes: list[str]
    img_size: int
    origin: Origin
    data: dict[str, Any]
    training: str
    metrics: dict[str, dict[str, float]]
    caution: str
    mean: tuple[float, ...] = Recipe.mean
    std: tuple[float, ...] = Recipe.std


@dataclass(frozen=True)
class Shipped:
    """Whether a model is in the folder and whose, how its graph compares or why there is none, what to heed."""

    name: str
    shipped: bool
    parity: Parity | None = None
    missing: str = ""
    warning: str = ""

    @classmethod
    def read(cls, said: dict[str, Any]) -> Shipped:
        """What `dataclasses.asdict` made of it."""
        return cls(**said | {"parity": said["parity"] and Parity(**said["parity"])})

    def lines(self, folder: Path) -> list[str]:
        """What a terminal says of it."""
        if self.parity is None:
            said = self.missing
        else:
            said = (f"on {self.parity.pictures} test pictures onnxruntime's probabilities differ by at most "
                    f"{self.parity.chances:.0e}")
        if not self.shipped:
            return [said]
        return [f"{folder} holds {self.name} to ship; {said}"] + ([f"warning: {self.warning}"] if self.warning else [])


def ship(product: Product, folder: Path, test: Split, graph: Path | None = None) -> Shipped:
    """Write the product into `folder`, in the place of what is there; `graph` is its ONNX file, where there is one.

    Without the extra `export`, or where the model cannot be exported or the graph differs by more than TOLERANCE, the
    graph and the program that needs it are left out, and the card says why.
    """
    model = deepcopy(product.model).cpu().eval()
    seen = some(test, PICTURES, product.img_size, product.mean, product.std)
    found: list[Shipped] = []

    def fill(part: Path) -> None:
        parity: Parity | None = None
        missing = HINT
        if has_onnx():
            try:
                if graph is None:
                    parity = export_square(model, part / "model.onnx", seen)
                else:
                    shutil.copyfile(graph, part / "model.onnx")
                    parity = checked(model, part / "model.onnx", seen)
                missing = ""
            except Exception as error:  # exporters raise whatever they like
                (part / "model.onnx").unlink(missing_ok=True)
                missing = f"model.onnx and predict.py are missing: {reason(error)}"
        if parity:
            program = files("saccade.tools").joinpath("predict.py.jinja").read_text(encoding="utf-8")
            (part / "predict.py").write_text(program, encoding="utf-8")
        look = preprocessing(product)
        write_safetensors(part / "model.safetensors", model.state_dict(), {"format": "pt", "model": product.name})
        _write_json(part / "preprocess.json", look)
        _write_json(part / "labels.json", product.classes)
        card = render("model_card.md.jinja", product=product, look=look, parity=parity, missing=missing,
                      cost=_cost(model, seen[:1], part), versions=_versions())
        (part / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        found.append(Shipped(product.name, True, parity, missing, product.origin.warning))

    fill_folder_whole(folder, fill)
    return found[0]


def preprocessing(product: Product) -> dict[str, Any]:
    """What `evaluation_transform` and `normalise` do to a picture, in words that predict.py follows."""
    return {
        "img_size": product.img_size,
        "resize": "shorter side to img_size, the other to int(img_size * longer / shorter)",
        "interpolation": "bilinear", "crop": "central square, corner at round((side - img_size) / 2)",
        "colour": "RGB", "orientation": "as EXIF says", "transparency": "on white", "deep_gray": "(value + 128) // 257",
        "mean": list(product.mean), "std": list(product.std), "pixels": "(value / 255 - mean) / std",
        "input": "image, float32 (batch, 3, img_size, img_size)", "output": "scores, float32 (batch, classes)",
    }


def _cost(model: nn.Module, image: Tensor, folder: Path) -> dict[str, str]:
    """Parameters, multiply-adds, bytes, and milliseconds of one picture."""
    found = {"parameters": scaled(sum(weight.numel() for weight in model.parameters()))}
    try:
        found["multiply-adds"] = scaled(count_macs(model, (image,)))
    except Exception:  # an operator that cannot be counted
        found["multiply-adds"] = "unknown"
    runs = {"PyTorch": lambda: model(image)}
    if (file := folder / "model.onnx").exists():
        session = open_session(file)
        found["model.onnx"] = f"{scaled(file.stat().st_size)}B"
        runs = {"onnxruntime": lambda: session.run(None, {"image": image.numpy()})} | runs
    with torch.no_grad():
        seconds = race(runs, rounds=ROUNDS)
    where = conditions()
    for name, times in seconds.items():
        took = summary([1000 * second for second in times])
        found[f"{name}, {where}"] = f"p50 {digits(took['p50'])} ms, p95 {digits(took['p95'])} ms"
    return found


def _versions() -> str:
    packages = ["torch", "timm", "numpy", "pillow", *(["onnx", "onnxruntime"] if has_onnx() else [])]
    return ", ".join([f"saccade {saccade.__version__}", *(f"{package} {version(package)}" for package in packages)])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
