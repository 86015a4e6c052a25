"""Our backbones beside timm's on a GPU, same weights, in bfloat16, in one process, taking turns.

    python -m benchmarks.backbones_gpu [--models "swin*" ...] [--batch 64] [--rounds 9]

For every model that both have: the forward, and forward with backward. Writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from benchmarks.backbones import names_of_both
from benchmarks.results import write_section
from saccade import SaccadeError
from saccade.tools.bench import pair
from saccade.tools.measure import peak_memory, race


def infer(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def learn(model: nn.Module, images: Tensor) -> None:
    """Forward and backward, as training does them, but for what is drawn at random."""
    model.zero_grad(set_to_none=True)
    model(images).float().square().mean().backward()


class Row(NamedTuple):
    """One model and pass: milliseconds, and ratios ours / timm's."""

    model: str
    kind: str
    ours: float
    theirs: float
    time: float
    memory: float

    def __str__(self) -> str:
        return (f"| {self.model} | {self.kind} | {self.ours:.2f} | {self.theirs:.2f} | {self.time:.2f} | "
                f"{self.memory:.2f} |")


def rows(name: str, batch: int, rounds: int) -> list[Row]:
    ours, theirs, _ = pair(name)
    models = {"ours": ours, "theirs": theirs}
    for model in models.values():
        model.to("cuda", torch.bfloat16)
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    found = []
    for kind, step in {"inference": infer, "training": learn}.items():
        calls: dict[str, Callable[[], Any]] = {who: partial(step, model, images) for who, model in models.items()}
        seconds = race(calls, rounds=rounds, warmup=3)
        ratio = median(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        memory = peak_memory(calls["ours"]) / peak_memory(calls["theirs"])
        ms = {who: 1e3 * median(times) for who, times in seconds.items()}
        found.append(Row(name, kind, ms["ours"], ms["theirs"], ratio, memory))
        print(found[-1], flush=True)
    return found


def mean(found: list[Row], kind: str) -> str:
    chosen = [row for row in found if row.kind == kind]
    time, memory = (geometric_mean(ratios) for ratios in zip(*((row.time, row.memory) for row in chosen), strict=True))
    return f"| geometric mean of {len(chosen)} | {kind} | | | **{time:.2f}** | **{memory:.2f}** |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of our names")
    parser.add_argument("--largest", type=float, default=30, help="million parameters")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    found: list[Row] = []
    for name in names_of_both(options.models, options.largest, 224):
        try:
            found += rows(name, options.batch, options.rounds)
        except (SaccadeError, RuntimeError) as reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
    write_section("backbones on a GPU", "\n".join([
        "## Backbones beside timm on a GPU", "",
        f"`python -m benchmarks.backbones_gpu`: {torch.cuda.get_device_name()}, torch {torch.__version__}, timm "
        f"{timm.__version__}, bfloat16, eager, 224 x 224, batch {options.batch}, same weights, {options.rounds} "
        "alternating rounds. Ratios are ours / timm's (smaller is better), time the median of the rounds' ratios, "
        "memory the peak above model and input.", "",
        "| model | pass | ours ms | timm ms | time ratio | memory ratio |", "|---|---|--:|--:|--:|--:|",
        *map(str, found), *(mean(found, kind) for kind in ("inference", "training")),
    ]))


if __name__ == "__main__":
    main()
