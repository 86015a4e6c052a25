"""How every backbone ships: compiled, exported, in bfloat16, channels-last and int8, each tried on a narrow model.

    python -m saccade.tools.deployment [MODEL ...]        writes docs/deployment.md (half a minute a model)

Rows are written one by one: models that are named, or all of which the page has no row yet, are tried anew.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.files import write_whole
from saccade.golden import fill
from saccade.tools.export import difference, export, int8, onnxruntime, write_onnx
from saccade.tools.matrix import hosts
from saccade.tools.pages import DOCS, Rows, page, recorded_in

PAGE = DOCS / "deployment.md"
YES = "✓"
SIZE = (40, 56)
TOLERANCE = 1e-4  # of a program's outputs against the model's, relative to the largest


def drawn(name: str) -> nn.Module:
    """A narrow model with the weights of goldens, which no initial zero hides."""
    model = create_model(name, num_classes=10).eval()
    state = {key: fill(key, value.shape, "var" if key.endswith("running_var") else "param")
             for key, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(model.state_dict() | state)
    return model


def compiled(model: nn.Module) -> str:
    """Whole, without a graph break."""
    torch._dynamo.reset()
    image = torch.randn(1, 3, *SIZE)
    program = torch.compile(model, fullgraph=True, backend="eager")
    return _agrees(program(image), model(image))


def exported(model: nn.Module) -> str:
    """Once, with free batch and sides; called at another size."""
    image = torch.randn(3, 3, 64, 48)
    return _agrees(_program(model).module()(image), model(image))


def onnx(model: nn.Module) -> str:
    """The largest relative difference of onnxruntime, at the size of the export and at another."""
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(_program(model), Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=["CPUExecutionProvider"])
        worst = max(difference(session, model, torch.randn(2, 3, *size)) for size in (SIZE, (72, 88)))
    return f"{worst:.0e}" if worst <= TOLERANCE else f"differs by {worst:.0e}"


@lru_cache(maxsize=1)
def _program(model: nn.Module) -> torch.export.ExportedProgram:
    return export(model, SIZE)


def bfloat16(model: nn.Module) -> str:
    """How far the scores drift under autocast."""
    image = torch.randn(4, 3, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(image)
    return f"{_difference(scores.float(), model(image)):.0e}"


def channels_last(model: nn.Module) -> str:
    """The same scores from a channels-last image."""
    image = torch.randn(2, 3, *SIZE)
    return _agrees(model(image.contiguous(memory_format=torch.channels_last)), model(image))


def int8_drift(model: nn.Module) -> str:
    """How far the scores drift when linear layers compute in int8."""
    image = torch.randn(4, 3, *SIZE)
    return f"{_difference(_int8(model)(image), model(image)):.0e}"


def int8_size(model: nn.Module) -> str:
    """Bytes of the int8 model's file over the float32 model's."""
    return f"{_bytes(_int8(model)) / _bytes(model):.2f}"


_int8 = lru_cache(maxsize=1)(int8)  # two trials ask for the same copy


TRIALS: dict[str, Callable[[nn.Module], str]] = {
    "compile": compiled, "export": exported, "ONNX": onnx, "bf16": bfloat16, "channels-last": channels_last,
    "int8": int8_drift, "int8 size": int8_size,
}


def row(name: str) -> dict[str, str]:
    """What became of each trial: `✓`, a number, or why it failed."""
    torch.manual_seed(0)
    model, cells = drawn(name), {}
    for title, trial in TRIALS.items():
        try:
            with torch.no_grad():
                cells[title] = trial(model)
        except Exception as error:  # a survey: whatever a compiler says is the answer
            cells[title] = _reason(error)
    return cells


def deployment(rows: Rows) -> str:
    """The page: a row a backbone, a column a trial."""
    count = {title: sum(" " not in cells[title] for cells in rows.values()) for title in ("compile", "export", "ONNX")}
    text = (
        f"The narrow models of {len(rows)} of {len(hosts())} families, weights as in goldens, {SIZE[0]} x {SIZE[1]} "
        "pixels. Of these, "
        f"{count['compile']} compile whole (`torch.compile(fullgraph=True)`), {count['export']} export with free batch "
        f"and sides, {count['ONNX']} run in onnxruntime (largest relative difference at two sizes). bf16: relative "
        "drift of the scores under autocast; channels-last: equal scores from a channels-last image; int8: relative "
        "drift with the linear layers in int8 (torchao, dynamic), and the size of that file over float32's. Generated "
        "by `python -m saccade.tools.deployment`."
    )
    return page("How every backbone ships", text, list(TRIALS), rows)


def _reason(error: BaseException) -> str:
    """The first line of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    line, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {line[:200]}"


def _agrees(got: Tensor, wanted: Tensor) -> str:
    worst = _difference(got, wanted)
    return YES if worst <= TOLERANCE else f"differs by {worst:.0e}"


def _difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def _bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def main(*names: str) -> int:
    todo = names or tuple(host for host in hosts() if host not in recorded_in(PAGE))
    for name in todo:
        found = row(name)
        print(name, found, flush=True)
        known = recorded_in(PAGE) | {name: found}  # read again: another run may have written beside this one
        write_whole(PAGE, deployment({host: known[host] for host in hosts() if host in known}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
