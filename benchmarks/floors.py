"""Every family's smallest published model beside the least time that its arithmetic and bytes take.

    python -m benchmarks.floors [MODEL ...]

One process, one thread, batch 1 at the published size, medians. A full run writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
from functools import partial
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import nn

from benchmarks.backbones import million
from benchmarks.results import write_section
from saccade import SaccadeError, create_model, list_models
from saccade.core.index import index, is_backbone, paper_module
from saccade.tools.bench import pair
from saccade.tools.measure import count_macs, peak_memory, race
from saccade.tools.roofline import floor, moved_bytes, rates, scan_states, yardsticks

Row = dict[str, Any]


def smallest(paper: str) -> str | None:
    """The published backbone of a paper with the fewest parameters."""
    known = index()["models"]
    names = [name for name in list_models() if known[name] == paper and is_backbone(name)
             and "_nano" not in name and "_narrow" not in name]
    return min(names, key=million) if names else None


def measure(name: str, rounds: int) -> Row:
    settings = paper_module(index()["models"][name]).SIZES[name]
    size = settings.get("img_size", 224)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    image = torch.randn(1, settings.get("in_chans", 3), *sides)
    models = ours_and_timms(name, size)
    forwards = {which: partial(model, image) for which, model in models.items()}
    seconds = race(forwards | yardsticks(), rounds=rounds)
    macs, moved = count_macs(models["ours"], (image,)), moved_bytes(models["ours"], (image,))
    states = scan_states(models["ours"], (image,))
    row: Row = dict(name=name, size="x".join(map(str, sides)), macs=macs, rates=rates(seconds),
                    seconds=median(seconds["ours"]), memory=peak_memory(forwards["ours"]),
                    floor=floor(macs, moved, rates(seconds), states))
    if "timm" in models:
        row["timm"] = median(ours / theirs for ours, theirs in zip(seconds["ours"], seconds["timm"], strict=True))
        row["timm_memory"] = row["memory"] / peak_memory(forwards["timm"])
    print(line(row), flush=True)
    return row


def ours_and_timms(name: str, size: Any) -> dict[str, nn.Module]:
    """Our model and, where timm has one of this name, timm's."""
    try:
        return dict(zip(("ours", "timm"), pair(name, size), strict=False))
    except SaccadeError:
        return {"ours": create_model(name).eval()}


def line(row: Row) -> str:
    beside = f"{row['timm']:.2f} | {row['timm_memory']:.2f}" if "timm" in row else " | "
    return (f"| {row['name']} | {row['size']} | {row['macs'] / 1e9:.2f} | {1e3 * row['seconds']:.1f} | "
            f"{1 / row['seconds']:.1f} | {row['memory'] / 2**20:.0f} | {1e3 * row['floor']:.1f} | "
            f"{row['seconds'] / row['floor']:.2f} | {beside} |")


def section(rows: list[Row], rounds: int) -> str:
    rows = sorted(rows, key=lambda row: -row["seconds"] / row["floor"])
    mean = geometric_mean(row["seconds"] / row["floor"] for row in rows)
    macs, copied, states = (median(row["rates"][which] for row in rows) / 1e9 for which in (0, 1, 2))
    return "\n".join([
        "## Backbones beside their floor", "",
        f"`python -m benchmarks.floors`: {platform.machine()}, one thread, torch {torch.__version__}, float32, batch "
        f"1, medians of {rounds} rounds, farthest from the floor first. The floor is the longer of the multiply-adds "
        f"at the rate of a matrix product ({macs:.0f} G/s here) and the bytes that layers with weights read and write "
        f"at that of a copy ({copied:.0f} GB/s). States of selective scans, tokens x channels x numbers a channel, are "
        f"arithmetic besides, at the rate of an exponential and a multiply-add in the cache ({states:.1f} G/s). All "
        f"three are measured in the same rounds. Not counted: Fourier transforms, sorting, norms and activations. "
        f"Geometric mean of time / floor: {mean:.2f}.", "",
        "| model | pixels | GMACs | ms | images/s | peak MiB | floor ms | time / floor | time / timm | memory / timm |",
        "|---|---|" + "--:|" * 8, *map(line, rows),
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    papers = sorted(set(index()["models"].values()))
    names = options.models or [name for name in map(smallest, papers) if name is not None]
    with torch.inference_mode():
        rows = [measure(name, options.rounds) for name in names]
    if not options.models:
        write_section("floors", section(rows, options.rounds))


if __name__ == "__main__":
    sys.exit(main())
