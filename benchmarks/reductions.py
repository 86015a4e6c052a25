"""Methods that compute less, beside their host: multiply-adds, time, and how much of the host's answer is left.

    python -m benchmarks.reductions [HOST]

One process, two threads, batch 8 at the host's size, alternating, medians. A full run writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.results import write_section
from saccade import apply, create_model
from saccade.tools.measure import count_macs, race

BATCH = 8
# What each method is asked, from little to much; those that learn weights of their own come with fresh ones.
RATES: dict[str, list[dict[str, Any]]] = {
    "evit": [dict(keep=0.9), dict(keep=0.7), dict(keep=0.5)],
    "ats": [dict(samples=196), dict(samples=98), dict(samples=49)],
    "patch_dropout": [dict(keep=0.7), dict(keep=0.5)],
    "token_merging": [dict(r=8), dict(r=13), dict(r=16)],
    "ia_red2": [dict(threshold=0.5)],
    "sparsifiner": [dict(keep=0.25)],
    "self_slimmed": [dict(layers=(3, 6, 9))],
}


# Expedite's published setting is for dense prediction by a deep network: all tokens come back, and all are compared.
DENSE = dict(host="vit_large_patch16_384", batch=1, side=512, rates={"expedite": [dict(keep=0.49), dict(keep=0.25)]})


def rows(
    host: str, rounds: int, batch: int = BATCH, side: int = 224, rates: dict[str, list[dict[str, Any]]] = RATES,
    tokens: slice = slice(1),
) -> list[dict[str, Any]]:
    """Each method at each rate beside the host, in races of their own; `tokens` are those whose features are compared.
    """
    torch.manual_seed(0)
    plain = create_model(host).eval()
    image = torch.randn(batch, 3, side, side)
    wanted, macs = plain.forward_features(image)[:, tokens], count_macs(plain, (image,))
    found = []
    for method, asked in rates.items():
        for options in asked:
            reduced = create_model(host).eval()
            reduced.load_state_dict(plain.state_dict())
            apply(reduced, method, **options)
            seconds = race({"host": partial(plain, image), "method": partial(reduced, image)}, rounds=rounds)
            faster = median(ours / theirs for ours, theirs in zip(seconds["host"], seconds["method"], strict=True))
            alike = F.cosine_similarity(reduced.forward_features(image)[:, tokens], wanted, dim=-1).mean()
            rate = ", ".join(f"{key}={value}" for key, value in options.items())
            found.append(dict(method=method, asked=rate, macs=count_macs(reduced, (image,)) / macs, faster=faster,
                              alike=float(alike)))
            print(line(found[-1]), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    return f"| {row['method']} | {row['asked']} | {row['macs']:.2f} | {row['faster']:.2f} | {row['alike']:.3f} |"


def table(found: list[dict[str, Any]]) -> list[str]:
    return ["| method | rate | multiply-adds | throughput | agreement |", "|---|---|--:|--:|--:|", *map(line, found)]


def section(host: str, found: list[dict[str, Any]], dense: list[dict[str, Any]], rounds: int) -> str:
    return "\n".join([
        "## Methods that compute less", "",
        f"`python -m benchmarks.reductions`: {host} (fresh weights), batch {BATCH} at 224 x 224, {platform.machine()}, "
        f"two threads, torch {torch.__version__}, float32, medians of {rounds} rounds. Multiply-adds, throughput are "
        "relative to the host (above 1: faster), agreement is the cosine of the class token with the host's. IA-RED2, "
        "Sparsifiner and SiT learn weights of their own, here fresh: a trained one would keep other tokens.", "",
        *table(found), "",
        f"For dense prediction, {DENSE['host']} at {DENSE['side']} x {DENSE['side']}, batch {DENSE['batch']}; "
        "agreement is the mean cosine of all tokens.", "", *table(dense),
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with torch.inference_mode():
        found = rows(options.host, options.rounds)
        dense = rows(**DENSE, rounds=3, tokens=slice(None))
        write_section("reductions", section(options.host, found, dense, options.rounds))


if __name__ == "__main__":
    sys.exit(main())
