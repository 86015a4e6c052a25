"""The networks of a contest as onnxruntime runs them: in single precision and in int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saccade.learn.score import proportion
from saccade.learn.train import Recipe
from saccade.learn.transforms import Squares, normalise, some
from saccade.tools.contestants import reason
from saccade.tools.export import export_square, has_onnx, open_session, quantize
from saccade.tools.measure import INT8, ONNX, conditions
from saccade.tools.ship import PICTURES
from saccade.tools.standings import Standing
from saccade.tools.trials import Arena, final_model


@dataclass(frozen=True)
class Graphs:
    """The files of one network by the name of what runs them, and why one is missing."""

    files: dict[str, Path]
    failed: str = ""


def write_graphs(
    arena: Arena, standings: Sequence[Standing], progress: Callable[[int, int], None]
) -> dict[str, Graphs]:
    """Files of every network that finished, by name; none at all without the extra `export`. Files there are kept."""
    networks = [each for each in standings if each.failed is None and each.entrant.build is not None]
    if not has_onnx():
        return {}
    found = {}
    for done, standing in enumerate(networks):
        found[standing.entrant.name] = _written(arena, standing)
        progress(done + 1, len(networks))
    return found


def _written(arena: Arena, standing: Standing) -> Graphs:
    folder, look = arena.folder(standing.entrant), (arena.img_size, Recipe.mean, Recipe.std)
    single, int8 = folder / "model.onnx", folder / "model.int8.onnx"
    try:
        if not single.exists():
            model = final_model(arena, standing.entrant, standing.answers)[0]
            export_square(model, single, some(arena.images.test, PICTURES, *look))
    except Exception as error:  # exporters raise whatever they like
        return Graphs({}, reason(error))
    try:
        if not int8.exists():
            quantize(single, int8, some(arena.images.train, PICTURES, *look).numpy())
    except Exception as error:
        return Graphs({ONNX: single}, f"int8: {reason(error)}")
    return Graphs({ONNX: single, INT8: int8})


def latency_of(graphs: dict[str, Graphs]) -> str:
    """What the latency that counts was measured with."""
    where = conditions()
    if not graphs:
        missing = "" if has_onnx() else '; pip install "saccade[export]" ranks by onnxruntime'
        return f"PyTorch {torch.__version__}, {where}{missing}"
    without = [f"{name} ({each.failed})" for name, each in graphs.items() if ONNX not in each.files]
    if without:
        return f"PyTorch {torch.__version__}, {where}; not onnxruntime, which has no graph of {', '.join(without)}"
    return f"onnxruntime {version('onnxruntime')}, {where}"


def add_int8(arena: Arena, graphs: dict[str, Graphs], numbers: dict[str, dict[str, Any]]) -> None:
    """Puts to each network's numbers the accuracy of its int8 graph on the test images, and why a graph is missing."""
    truth = np.array(arena.images.test.labels)
    for name in numbers.keys() & graphs.keys():
        numbers[name]["graph_failed"] = graphs[name].failed or None
        if INT8 in graphs[name].files:
            right = predictions(arena, graphs[name].files[INT8]) == truth
            numbers[name]["int8_accuracy"] = proportion(right[None]).as_dict()


def predictions(arena: Arena, file: Path) -> NDArray[np.int64]:
    """(N,): the classes that a graph gives the test pictures."""
    session, batches = open_session(file), Squares(arena.images.test, arena.img_size).loader(arena.batch_size)
    scores = [session.run(None, {"image": normalise(pixels, Recipe.mean, Recipe.std).numpy()})[0]
              for pixels, _ in batches]
    return np.concatenate(scores).argmax(1)
