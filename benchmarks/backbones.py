"""Our backbones beside timm's, same weights: `saccade bench --against timm` for every model that both have.

    python -m benchmarks.backbones

Three complete runs, each in a fresh process, in which ours and timm's take turns. Writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import sys
from functools import partial
from statistics import geometric_mean, median
from typing import Any

import timm
import torch

from benchmarks.results import write_section
from saccade import SaccadeError, create_model, list_models
from saccade.core.names import matching
from saccade.tools.bench import bench, timm_name

Row = dict[str, Any]


def names_of_both(patterns: list[str], largest: float, size: int) -> list[str]:
    """Our models that timm has too, native to `size`, of at most `largest` million parameters."""
    chosen = dict.fromkeys(name for pattern in patterns for name in matching(list_models(), pattern))
    names = [name for name in chosen if native(timm_name(name)) == size]
    return [name for name in names if million(name) <= largest]


def native(other: str | None) -> int | None:
    settings = timm.models.get_pretrained_cfg(other) if other else None
    return settings.input_size[-1] if settings else None


def million(name: str) -> float:
    with torch.device("meta"):
        return sum(weight.numel() for weight in create_model(name).parameters()) / 1e6


def run(number: int, names: list[str], settings: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        try:
            rows += bench([name], against="timm", **settings)
        except SaccadeError as reason:  # a model of timm's that only shares the name
            print(f"left out: {reason}", file=sys.stderr)
            continue
        print(f"run {number + 1}: {name} {[round(row['ratio'], 3) for row in rows if row['model'] == name]}",
              file=sys.stderr, flush=True)
    return rows


def section(runs: list[list[Row]], command: str, settings: dict[str, Any]) -> str:
    """Each model's ratios, and the geometric mean over the models of each run."""
    titles = [f"run {number + 1}" for number in range(len(runs))]
    lines = [
        "## Backbones beside timm", "",
        f"`{command}`: {platform.machine()}, {settings['threads']} thread(s), torch {torch.__version__}, timm "
        f"{timm.__version__}, float32, {settings['size']} x {settings['size']}, {settings['rounds']} alternating "
        "rounds a run. Time and memory are ours / timm's (smaller is better), time the median of the rounds' ratios; "
        "difference is the largest of the outputs on the same weights, relative. timm's PoolFormer pools before its "
        "last norm, its authors (and we) after it: equal features, other logits.", "",
        f"| model | batch | ours ms | timm ms | {' | '.join(titles)} | memory | difference |",
        "|---|" + "--:|" * (5 + len(runs)),
    ]
    for rows in zip(*runs):
        ours, theirs = (median(row[key] for row in rows) * 1e3 for key in ("p50", "other_p50"))
        first = rows[0]
        ratios = " | ".join(f"{row['ratio']:.3f}" for row in rows)
        difference = first["note"] or f"{first['difference']:.0e}"
        lines.append(f"| {first['model']} | {first['batch']} | {ours:.1f} | {theirs:.1f} | {ratios} | "
                     f"{first['memory_ratio']:.2f} | {difference} |")
    for batch in settings["batch"]:
        chosen = [[row for row in rows if row["batch"] == batch] for rows in runs]
        means = " | ".join(f"**{geometric_mean(row['ratio'] for row in rows):.3f}**" for rows in chosen)
        memory = geometric_mean(row["memory_ratio"] for row in chosen[0])
        lines.append(f"| geometric mean of {len(chosen[0])} | {batch} | | | {means} | {memory:.2f} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of our names")
    parser.add_argument("--largest", type=float, default=30, help="million parameters")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    settings = {key: getattr(options, key) for key in ("batch", "size", "threads", "rounds")}
    names = names_of_both(options.models, options.largest, options.size)
    if not names:
        parser.error(f"no model of {options.models} of at most {options.largest} M parameters is in timm too")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = pool.map(partial(run, names=names, settings=settings), range(options.runs), chunksize=1)
    write_section("backbones", section(runs, " ".join(["python -m benchmarks.backbones", *sys.argv[1:]]), settings))


if __name__ == "__main__":
    main()
