"""A model as it ships: a program that needs neither us nor its paper (torch.export, ONNX), and in int8."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from operator import floordiv
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.fx.experimental._config as fx_config
from numpy.typing import NDArray
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.files import fill_whole
from saccade.core.optional import optional
from saccade.tools.measure import limited_threads

onnxruntime = optional("onnxruntime", extra="export")
onnxscript = optional("onnxscript", extra="export")
quantization = optional("onnxruntime.quantization", extra="export")
shape_inference = optional("onnxruntime.quantization.shape_inference", extra="export")
torchao = optional("torchao", extra="quant")

TOLERANCE = 1e-4
CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Parity:
    """How far an ONNX graph is from the Python model on a number of real pictures.

    `scores` is the largest difference of a score, relative to the largest score; `chances` that of a probability;
    `agree` counts the pictures that both give the same class.
    """

    pictures: int
    scores: float
    chances: float
    agree: int


def has_onnx() -> bool:
    """Whether the extra `export` is installed."""
    return all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def export(model: nn.Module, size: int | Sequence[int] = 224, *, in_chans: int = 3) -> torch.export.ExportedProgram:
    """The model as one graph with free batch and image sizes, traced on an image of about `size` (pixels).

    Traced under `backed_size_oblivious`, at a size that no stride divides: neither a side that happens to be divisible
    nor a stage of one window is baked in.
    """
    sides = _sides(size)
    image = torch.randn(2, in_chans, *sides)
    free = {0: torch.export.Dim.AUTO} | dict.fromkeys(range(2, image.ndim), torch.export.Dim.DYNAMIC)
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with oblivious, _pooling_of_any_size(), torch.no_grad():
        return torch.export.export(model.eval(), (image,), dynamic_shapes=(free,))


def _pooling_of_any_size() -> AbstractContextManager[Any]:
    """Before 2.13, torch asks in the shape of a pooling whether the stride divides the side, of which the answer needs
    nothing, and bakes it in.
    """
    older = torch.__version__ < "2.13"
    return patch.object(torch._meta_registrations, "div_rtn", floordiv) if older else nullcontext()


def export_onnx(
    model: nn.Module, file: str | Path, size: int | Sequence[int] = 224, *, in_chans: int = 3
) -> dict[str, float]:
    """Write `file` with free batch and image sizes, run it by onnxruntime at two sizes and compare.

    Returns the largest difference at each size ("224x224": 1e-6), relative to the largest output. Raises SaccadeError
    where one is over TOLERANCE; the file is then not kept.
    """
    sides, path = _sides(size), Path(file)
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        write_onnx(export(model, sides, in_chans=in_chans), partial)
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        found = {}
        for other in (sides, tuple(side + 32 for side in sides)):
            found["x".join(map(str, other))] = difference(session, model, torch.randn(2, in_chans, *other))
        worst = max(found.values())
        if not worst <= TOLERANCE:
            raise SaccadeError(f"{path}: onnxruntime differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}; "
                               "not written")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return found


def export_square(model: nn.Module, file: Path, images: Tensor) -> Parity:
    """Write `file`: the model for RGB squares of the size of `images` (N, 3, S, S), in batches of any number.

    One size is exported sooner and runs faster than all sizes, and suits what knows one size only. Raises SaccadeError
    where onnxruntime differs on these images by more than TOLERANCE; the file is then not kept.
    """
    model = copy.deepcopy(model).cpu().eval()
    with torch.no_grad(), limited_threads(1):  # many small sums: threads would wait for each other
        program = torch.export.export(model, (torch.randn(2, *images.shape[1:]),),
                                      dynamic_shapes=({0: torch.export.Dim.AUTO},))
        found: list[Parity] = []

        def fill(part: Path) -> None:
            write_onnx(program, part)
            found.append(checked(model, part, images))

        fill_whole(file, fill)
    return found[0]


def checked(model: nn.Module, file: Path, images: Tensor) -> Parity:
    """The graph in a file beside the model on `images`, alone and in one batch; SaccadeError over TOLERANCE."""
    session = open_session(file)
    with torch.no_grad():
        wanted = model(images).float()
    together = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    alone = torch.from_numpy(session.run(None, {"image": images[:1].numpy()})[0])
    both = torch.cat([together, alone]), torch.cat([wanted, wanted[:1]])
    gaps = [float((got - true).abs().max()) for got, true in (both, [each.softmax(-1) for each in both])]
    agree = int((together.argmax(-1) == wanted.argmax(-1)).sum())
    found = Parity(len(images), gaps[0] / max(float(wanted.abs().max()), 1e-12), gaps[1], agree)
    if not found.scores <= TOLERANCE:
        raise SaccadeError(f"onnxruntime differs from PyTorch by {found.scores:.1e}, more than {TOLERANCE:.0e}")
    return found


def quantize(file: Path, target: Path, images: NDArray[np.float32]) -> None:
    """Write the graph in `file` with int8 weights and activations in convolutions and matrix products.

    `images` (N, 3, H, W) give the ranges of the activations once: to take them anew from each picture, as `int8` does,
    is slow in convolutions.
    """
    batches = iter([{"image": batch} for batch in np.array_split(images, -(-len(images) // CALIBRATION_BATCH))])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(batches, None)

    def fill(part: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            ready = Path(folder) / "ready.onnx"
            shape_inference.quant_pre_process(file, ready, skip_symbolic_shape=True)
            quantization.quantize_static(ready, part, Reader(), op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                                         per_channel=True)

    fill_whole(target, fill)


def open_session(file: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the processor, with so many threads (None: as many as torch has)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised: it need not be printed, too
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def write_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    """The program of `export` in ONNX, "image" in, "scores" out."""
    onnxscript.script  # noqa: B018  (the exporter imports it itself, with a traceback instead of one line)
    translated = torch.onnx.export(program, (), input_names=["image"], output_names=["scores"], dynamo=True,
                                   verbose=False)
    assert translated is not None
    translated.save(file, external_data=False)


def difference(session: Any, model: nn.Module, image: Tensor) -> float:
    """The largest difference of an ONNX session's scores from the model's, relative to the largest score."""
    with torch.no_grad():
        wanted = model(image).numpy()
    got = session.run(None, {"image": image.numpy()})[0]
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def _sides(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def int8(model: nn.Module) -> nn.Module:
    """A copy whose linear layers hold int8 weights and quantise what they are given on each call (torchao)."""
    quantized = copy.deepcopy(model)
    torchao.quantization.quantize_(quantized, torchao.quantization.Int8DynamicActivationInt8WeightConfig())
    return quantized
