"""Which of several ways an op computes, by device, type and shape: a table of reasons, decided by the op itself.

    print(explain_choice("neighborhood", grid=(56, 56), heads=4, head_dim=32, device="cuda", dtype=torch.bfloat16))
    with prefer("flex"):
        model(image)

`logging.getLogger("saccade.ops")` says at level DEBUG which way ran, once for each distinct case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from saccade.core.errors import SaccadeError
from saccade.core.names import closest
from saccade.core.optional import optional
from saccade.core.record import recording

natten = optional("natten", extra="natten")
logger = logging.getLogger("saccade.ops")


class Case(NamedTuple):
    """What decides. `training` means that a gradient is asked for."""

    op: str
    device: str
    dtype: torch.dtype
    grid: tuple[int, ...]
    heads: int
    head_dim: int
    batch: int
    bias: bool
    training: bool
    pattern: str  # in words, for people
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        return (f"{self.op} attention{', training' if self.training else ''}: batch {self.batch}, "
                f"{'x'.join(map(str, self.grid))}, {self.heads} heads x {self.head_dim}, {self.pattern}"
                f"{', bias' if self.bias else ''}, {str(self.dtype).removeprefix('torch.')} on {self.device}")


class Rule(NamedTuple):
    """A reason against a path: that it cannot run, or (`slow`) that another is the better one."""

    applies: Callable[[Case], object]
    why: str  # may hold {found}, what `applies` returned
    slow: bool = False


class Path(NamedTuple):
    name: str
    how: str
    rules: tuple[Rule, ...] = ()


class Choice(NamedTuple):
    path: str
    why: str


@lru_cache(maxsize=1)
def _natten_lacks() -> str:
    """Why NATTEN's kernels cannot be called, or nothing."""
    try:
        return "" if natten.na2d and natten.HAS_LIBNATTEN else "natten was built without its kernels"
    except Exception as error:  # not installed, or built for another torch, which shows in many ways
        return str(error).splitlines()[0]


@lru_cache(maxsize=8)
def _gpu_lacks(dtype: torch.dtype) -> str:
    """What this machine lacks to compile for its GPU, or nothing."""
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if find_spec("triton") is None:
        return "triton is not installed"
    needed, found = (8, 0) if dtype == torch.bfloat16 else (7, 0), torch.cuda.get_device_capability()
    return "" if found >= needed else f"needs compute capability {needed}, this GPU has {found}"


_HALF = (torch.bfloat16, torch.float16)
_NATTEN = Path("natten", "NATTEN's fused kernels", (
    Rule(lambda case: case.device != "cuda" or torch.version.hip, "for NVIDIA GPUs"),
    Rule(lambda case: case.dtype not in _HALF, "for bfloat16 and float16"),
    Rule(lambda case: case.bias, "has no relative bias"),
    Rule(lambda case: case.batch == 0, "for one image at least"),
    Rule(lambda case: 1 in case.kernel, "needs kernels of at least 2"),
    Rule(lambda case: case.head_dim % 8, "needs a head_dim that is a multiple of 8"),
    Rule(lambda case: _natten_lacks(), "{found}"),
))
_FLEX_HOW = "FlexAttention, compiled, without the blocks in which nobody sees anybody"
_FLEX = (
    Rule(lambda case: case.device not in ("cuda", "cpu"), "for CUDA devices and CPUs"),
    Rule(lambda case: case.dtype not in (*_HALF, torch.float32), "for bfloat16, float16 and float32"),
    Rule(lambda case: case.batch == 0, "for one image at least"),
    Rule(lambda case: case.device == "cpu" and case.training, "has no gradient on a CPU"),
    Rule(lambda case: case.device == "cuda" and not 16 <= case.head_dim <= 256, "needs a head_dim of 16 to 256"),
    Rule(lambda case: case.device == "cuda" and _gpu_lacks(case.dtype), "{found}"),
    Rule(lambda case: case.device == "cpu", "on a CPU each shape compiles for a third of a minute", slow=True),
    Rule(lambda case: prod(case.grid) <= 128, "so few tokens are one block, of which nothing is left out", slow=True),
)
_BIAS_GRADIENT = Rule(lambda case: case.bias and case.training, "sums the gradient of a bias by atomic adds", slow=True)
PATHS = {  # the first without a reason against it runs
    "neighborhood": (
        _NATTEN,
        Path("flex", _FLEX_HOW, (*_FLEX, _BIAS_GRADIENT)),
        Path("eager", "tiles of near queries, one fused call for all"),
        Path("reference", "loops in float64", (
            Rule(lambda case: case.training, "has no gradient"),
            Rule(lambda case: True, "slow and obvious, to test against", slow=True),
        )),
    ),
    "pattern": (
        Path("flex", _FLEX_HOW, _FLEX),
        Path("eager", "one fused call under a mask of all pairs"),
    ),
}
_preferred: list[str] = []


def to_choose(x: Tensor) -> bool:
    """Whether an op with input `x` has anything to choose; the eager path asks nothing else.

    Not on a CPU, unless a path is preferred or the log is read; and never while compiling, exporting or recording, or
    under a mode that watches operators (counters, fake tensors): those see the eager path, whatever is preferred.
    """
    if torch.compiler.is_compiling() or not (x.is_cuda or _preferred or logger.isEnabledFor(logging.DEBUG)):
        return False
    return not recording() and _get_current_dispatch_mode() is None


def choose(case: Case) -> Choice:
    """The path for a case, and what speaks for it; the preferred one, or a SaccadeError that says why it cannot run."""
    choice = _choose(case, _preferred[-1] if _preferred else None)
    if logger.isEnabledFor(logging.DEBUG):
        _say(case, choice)
    return choice


@contextmanager
def prefer(path: str) -> Iterator[None]:
    """Inside the block, ops compute by `path` ("natten", "flex", "eager", "reference") or raise SaccadeError.

    What compiles, exports or records goes the eager way all the same.
    """
    known = sorted({each.name for paths in PATHS.values() for each in paths})
    if path not in known:
        raise SaccadeError(f"no path {path!r}{closest(path, known)}; there are {', '.join(known)}")
    _preferred.append(path)
    try:
        yield
    finally:
        _preferred.pop()


def explain_choice(
    op: str = "neighborhood",
    *,
    grid: tuple[int, ...],
    heads: int,
    head_dim: int,
    kernel: int | tuple[int, ...] = 7,
    dilation: int | tuple[int, ...] = 1,
    batch: int = 1,
    bias: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> str:
    """A line for each path of the op "neighborhood": whether it can run in this case, on this machine, and why.

    An arrow stands before the one that does; "can" are those that `prefer` could bring about.
    """
    case = Case(op, torch.device(device).type, dtype, grid, heads, head_dim, batch, bias, training,
                f"kernel {kernel}, dilation {dilation}", (kernel,) if isinstance(kernel, int) else tuple(kernel))
    chosen = choose(case).path
    lines = [str(case)]
    for path in _paths(op):
        against = _against(path, case)
        verdict = "yes" if path.name == chosen else "no" if against and not against[0].slow else "can"
        reasons = "; ".join(rule.why for rule in against)
        lines.append(f"{'->' if path.name == chosen else '  '} {path.name:<9} {verdict:<3}  {path.how}"
                     f"{f': {reasons}' if reasons else ''}")
    return "\n".join(lines)


def _paths(op: str) -> tuple[Path, ...]:
    if op not in PATHS:
        raise SaccadeError(f"no op {op!r} with a choice{closest(op, PATHS)}; there are {', '.join(PATHS)}")
    return PATHS[op]


def _against(path: Path, case: Case) -> list[Rule]:
    """What speaks against a path: the first reason why it cannot run, or all why it is not the best."""
    held = []
    for rule in path.rules:
        found = rule.applies(case)
        if found:
            held.append(rule._replace(why=rule.why.format(found=found)))
            if not rule.slow:
                return held[-1:]
    return held


@lru_cache(maxsize=1024)
def _choose(case: Case, preferred: str | None) -> Choice:
    paths = _paths(case.op)
    if preferred is None:
        return next(Choice(path.name, path.how) for path in paths if not _against(path, case))
    for path in paths:
        if path.name == preferred:
            against = [rule.why for rule in _against(path, case) if not rule.slow]
            if against:
                raise SaccadeError(f"prefer({preferred!r}): {case}: {path.how}: {against[0]}")
            return Choice(path.name, f"preferred: {path.how}")
    raise SaccadeError(f"prefer({preferred!r}): {case.op} attention has the paths {', '.join(p.name for p in paths)}")


@lru_cache(maxsize=1024)
def _say(case: Case, choice: Choice) -> None:
    logger.debug("%s: %s (%s)", case, *choice)
