"""A training step of FIT on one very large image, and what memory it takes.

    python -m benchmarks.fit_memory [--side 6400] [--layers "(2)4(2)4(2)"] [--recompute]

The paper's claim: 6400 x 6400 pixels, 160 000 tokens of 16 x 16, forward and backward under 16 GB. `--recompute`
keeps what enters the layers alone and computes the rest again in the backward. The peak is that of the whole process,
as the system sees it.
"""

from __future__ import annotations

import argparse
import resource
import sys
from functools import partial
from time import perf_counter

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.results import write_section
from saccade import create_model

LIMIT = 16 * 10**9


def measure(side: int, layers: str, recompute: bool) -> tuple[int, int, float]:
    """Tokens, bytes at the peak of the process, seconds of one forward and backward of fit_narrow."""
    model = create_model("fit_narrow", img_size=side, layers=layers).train()
    if recompute:
        for block in model.blocks:
            for layer in (*block.local, *block.over):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    image = torch.randn(1, 3, side, side)
    start = perf_counter()
    model(image).logsumexp(1).sum().backward()
    seconds = perf_counter() - start
    if not all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters()):
        raise RuntimeError("a parameter has no finite gradient")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (side // 16) ** 2, peak, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=6400)
    parser.add_argument("--layers", default="(2)4(2)4(2)")
    parser.add_argument("--recompute", action="store_true")
    options = parser.parse_args()
    tokens, peak, seconds = measure(options.side, options.layers, options.recompute)
    text = (f"fit_narrow, layers {options.layers}, {options.side} x {options.side} pixels, {tokens} tokens, batch 1, "
            f"float32, on {torch.get_num_threads()} thread(s) of a CPU, activations "
            f"{'recomputed a layer at a time' if options.recompute else 'kept'}: forward and backward took "
            f"{peak / 1e9:.2f} GB at the peak of the process and {seconds:.0f} s.")
    print(text)
    write_section("fit_memory", f"## FIT on a very large image\n\n`python -m benchmarks.fit_memory`: {text}")
    if peak > LIMIT:
        sys.exit(f"over {LIMIT / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
