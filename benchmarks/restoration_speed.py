"""HAT and RGT beside their plain form, which writes out the attention weights of all windows.

    python -m benchmarks.restoration_speed [MODEL ...] [--sides 128,256] [--rounds 3]

The plain form is the same network with the same weights: windows cut by a copy, then q k^T, plus the bias, plus the
mask of each window, the softmax, times v, each step a tensor of all windows, as the authors' code has it. One process,
one thread, batch 1, evaluation; medians of ratios taken round by round; peak memory from the allocator's events. A full
run writes its section of RESULTS.md; three rounds take about 13 minutes on a core of its own.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.results import write_section
from saccade import create_model
from saccade.tools.measure import peak_memory, race

MODELS, SIDES = ("hat_s_x2", "rgt_s_x2"), "128,256"
HEAD = "| model | input | ms | plain / ours, time | peak MiB | ours / plain, memory |\n|---|---|" + "--:|" * 4


@contextmanager
def written_out() -> Iterator[None]:
    """The library's own explicit form of attention, that of a forward which `record` watches; nothing is recorded."""
    with patch("saccade.ops.attend.recording", lambda: True):  # which also asks for no parts
        yield


def plain(model: nn.Module, image: Tensor) -> Tensor:
    with written_out():
        made: Tensor = model(image)
    return made


class Watched:
    """A forward whose memory is watched when it is called the second time: its tables are kept then, no round is lost.

    Watching costs little beside seconds.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.calls, self.peak = function, 0, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 2:
            self.peak = peak_memory(self.function)
        else:
            self.function()


def measure(name: str, side: int, rounds: int) -> str:
    model, image = create_model(name).eval(), torch.rand(1, 3, side, side)
    torch.testing.assert_close(model(image[..., :64, :64]), plain(model, image[..., :64, :64]), rtol=1e-4, atol=1e-5)
    forms = {"ours": Watched(partial(model, image)), "plain": Watched(partial(plain, model, image))}
    seconds = race(forms, rounds=rounds, warmup=0)  # a forward takes seconds: what the first builds does not count
    faster = median(plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True))
    return (f"| {name} | {side}x{side} | {1e3 * median(seconds['ours']):.0f} | {faster:.2f} | "
            f"{forms['ours'].peak / 2**20:.0f} | {forms['ours'].peak / forms['plain'].peak:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--sides", default=SIDES)
    parser.add_argument("--rounds", type=int, default=3, help="2 or more; memory is watched in the second")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: give 2 or more")
    torch.set_num_threads(1)
    print(HEAD)
    rows = []
    for side in map(int, options.sides.split(",")):
        for name in options.models:
            with torch.inference_mode():
                rows.append(measure(name, side, options.rounds))
            print(rows[-1], flush=True)
    if tuple(options.models) == MODELS and options.sides == SIDES:
        said = (f"`python -m benchmarks.restoration_speed --rounds {options.rounds}`: {platform.machine()}, one "
                f"thread, torch {torch.__version__}, float32, batch 1. The plain form is the same network that writes "
                "out the weights, biases and masks of all windows at once.")
        title = "## Restoration beside its plain form"
        write_section("restoration_speed", "\n".join([title, "", said, "", HEAD, *rows]))


if __name__ == "__main__":
    main()
