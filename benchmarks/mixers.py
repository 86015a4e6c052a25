"""Token mixers beside their textbook forms, same parameters: one process, one thread, taking turns, medians, memory.

    python -m benchmarks.mixers [MIXER ...]

All mixers that have a form in `benchmarks/textbook` are measured. A full run writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch

from benchmarks.results import write_section
from benchmarks.textbook import forms
from saccade import Site, create_mixer
from saccade.tools.measure import peak_memory, race

# (grid, channels, stage, stride): the first two stages of a pyramid on 224 x 224 pixels.
PLACES = [((56, 56), 96, 0, 4), ((28, 28), 192, 1, 8)]
Row = dict[str, Any]


def measure(name: str, batch: int, rounds: int) -> list[Row]:
    """One row a place: milliseconds, MiB and the arithmetic floor of a mixer beside its textbook form."""
    rows = []
    for grid, dim, stage, stride in PLACES:
        torch.manual_seed(0)
        site = Site(dim, dim // 32, stage=stage, index=1, stride=stride, grid=grid)
        mixer, x = create_mixer(name, site).eval(), torch.randn(batch, *grid, dim)
        calls = {"ours": partial(mixer, x), "textbook": partial(forms()[name], mixer, x)}
        torch.testing.assert_close(calls["ours"](), calls["textbook"](), rtol=1e-3, atol=1e-4)
        seconds = race(calls, rounds=rounds)
        ratio = median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds["textbook"], strict=True))
        memory = {which: peak_memory(call) / 2**20 for which, call in calls.items()}
        rows.append(dict(name=name, place=f"{'x'.join(map(str, grid))}x{dim}", ratio=ratio, memory=memory,
                         ms={which: 1e3 * median(times) for which, times in seconds.items()},
                         floor=1e3 * batch * mixer.cost(site, grid) / multiply_add_rate(batch * prod(grid), dim)))
        print(line(rows[-1]), flush=True)
    return rows


def multiply_add_rate(tokens: int, dim: int, rounds: int = 5) -> float:
    """Multiply-adds a second of a (tokens, dim) x (dim, 4 dim) product: what the arithmetic floor is stated in."""
    x, weight = torch.randn(tokens, dim), torch.randn(dim, 4 * dim)
    return tokens * dim * 4 * dim / median(race({"product": partial(torch.mm, x, weight)}, rounds=rounds)["product"])


def line(row: Row) -> str:
    ms, memory = row["ms"], row["memory"]
    return (f"| {row['name']} | {row['place']} | {ms['ours']:.1f} | {ms['textbook']:.1f} | {row['ratio']:.2f} | "
            f"{row['floor']:.1f} | {memory['ours']:.0f} | {memory['textbook']:.0f} | "
            f"{memory['ours'] / max(memory['textbook'], 1e-9):.2f} |")


def section(rows: list[Row], batch: int, rounds: int) -> str:
    return "\n".join([
        "## Token mixers beside their textbook forms", "",
        f"`python -m benchmarks.mixers`: {platform.machine()}, one thread, torch {torch.__version__}, float32, "
        f"inference, batch {batch}, {rounds} alternating rounds. \"times faster\" is the median of the rounds' ratios "
        "textbook / ours; the floor is the declared multiply-adds at the rate of a plain matrix product of this "
        "machine; memory is the peak above the input, and its ratio ours / textbook.", "",
        "| mixer | place | ours ms | textbook ms | times faster | floor ms | ours MiB | textbook MiB | memory |",
        "|---|---|" + "--:|" * 7, *map(line, rows),
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixers", nargs="*")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    unknown = sorted(set(options.mixers) - set(forms()))
    if unknown:
        parser.error(f"no textbook form of {unknown}; there are {sorted(forms())}")
    torch.set_num_threads(1)
    with torch.inference_mode():
        names = options.mixers or sorted(forms())
        rows = [row for name in names for row in measure(name, options.batch, options.rounds)]
    if not options.mixers:
        write_section("mixers", section(rows, options.batch, options.rounds))


if __name__ == "__main__":
    sys.exit(main())
