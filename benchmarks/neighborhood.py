"""Neighborhood attention beside the ways to compute it without us, in one process, taking turns.

    python -m benchmarks.neighborhood [--batch 1] [--sizes 14 28 56] [--rounds 15]

On one thread of the CPU in float32 beside its two textbook forms; then, where there is a GPU, in bfloat16 beside
attention of all tokens to all, with the floor: the bytes of q, k, v and the output (and in training their gradients),
each moved once, at the rate of a plain copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import write_section
from saccade import SaccadeError
from saccade.ops import prefer
from saccade.ops.flex import flex_kernel
from saccade.ops.neighborhood import neighborhood_attention
from saccade.ops.pattern import Everywhere
from saccade.tools.measure import peak_memory, race

HEADS, DIM, WINDOW = 4, 32, 7
Form = Callable[[Tensor, Tensor | None], Tensor]


def ours(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, H, W, 3 C), one projection's output; bias (h, 2 k - 1, 2 k - 1)."""
    q, k, v = x.view(*x.shape[:-1], 3, HEADS, DIM).unbind(-3)
    return neighborhood_attention(q, k, v, WINDOW, 1, bias)


def starts(size: int) -> Tensor:
    return (torch.arange(size) - WINDOW // 2).clamp(0, size - WINDOW)


class Unfold:
    """Each query's window copied out: F.unfold where the window fits, the border's windows repeated outwards."""

    def __init__(self, size: int) -> None:
        shift = starts(size)[:, None] + torch.arange(WINDOW) - torch.arange(size)[:, None] + WINDOW - 1
        self.index = (shift[:, None, :, None] * (2 * WINDOW - 1) + shift[None, :, None, :]).view(size**2, WINDOW**2)

    def windows(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        inner = F.unfold(x.permute(0, 3, 1, 2), WINDOW).view(B, -1, H - WINDOW + 1, W - WINDOW + 1)
        every = F.pad(inner, [WINDOW // 2] * 4, mode="replicate")
        return every.view(B, HEADS, DIM, WINDOW**2, H * W).permute(0, 1, 4, 3, 2)  # (B, h, N, k k, d)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        B, H, W, _ = x.shape
        q, k, v = x.chunk(3, -1)
        q = q.reshape(B, H * W, HEADS, 1, DIM).transpose(1, 2) * DIM**-0.5
        logits = q @ self.windows(k).transpose(-2, -1)  # (B, h, N, 1, k k)
        if bias is not None:
            logits = logits + bias.flatten(1)[:, self.index].unsqueeze(-2)
        out: Tensor = logits.softmax(-1) @ self.windows(v)
        return out.transpose(1, 2).reshape(B, H, W, HEADS, DIM)


class Dense:
    """All N x N pairs, -inf where a key is outside the window; mask and bias index are built once."""

    def __init__(self, size: int) -> None:
        at, start = torch.arange(size), starts(size)[:, None]
        seen = (at >= start) & (at < start + WINDOW)
        seen = (seen[:, None, :, None] & seen[None, :, None, :]).view(size**2, size**2)
        self.mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        shift = (at - at[:, None] + WINDOW - 1).clamp(0, 2 * WINDOW - 2)
        self.index = (shift[:, None, :, None] * (2 * WINDOW - 1) + shift[None, :, None, :]).view(size**2, size**2)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        mask = self.mask if bias is None else self.mask + bias.flatten(1)[:, self.index]
        return of_grid(F.scaled_dot_product_attention(*heads_first(x), mask), x)


def heads_first(x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v (B, h, N, d) of (B, H, W, 3 C)."""
    return x.view(x.shape[0], -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind()


def of_grid(out: Tensor, x: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(*x.shape[:-1], HEADS, DIM)


def step(form: Form, x: Tensor, bias: Tensor | None, train: bool) -> None:
    if train:
        leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
        torch.autograd.grad(form(leaves[0], None if bias is None else leaves[1]).sum(), leaves)
    else:
        with torch.no_grad():
            form(x, bias)


def on_the_cpu(sizes: Sequence[int], batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    print(f"{HEADS} heads x {DIM}, window {WINDOW}, batch {batch}, float32, one thread; ms, MiB", flush=True)
    print("grid   bias  pass       ours   unfold    dense | faster than the better | MiB ours unfold dense | of unfold")
    for size in sizes:
        forms: dict[str, Form] = {"ours": ours, "unfold": Unfold(size), "dense": Dense(size)}
        x = torch.randn(batch, size, size, 3 * HEADS * DIM)
        for bias in (None, torch.randn(HEADS, 2 * WINDOW - 1, 2 * WINDOW - 1)):
            expected = ours(x, bias)
            for form in forms.values():
                torch.testing.assert_close(form(x, bias), expected, rtol=1e-4, atol=1e-5)
            for train in (False, True):
                calls = {name: partial(step, form, x, bias, train) for name, form in forms.items()}
                ms = {name: 1e3 * median(seconds) for name, seconds in race(calls, rounds=rounds).items()}
                memory = {name: peak_memory(call) / 2**20 for name, call in calls.items()}
                of_unfold = memory["ours"] / max(memory["unfold"], 0.1)
                print(
                    f"{size:>2}x{size:<3} {'no ' if bias is None else 'yes'}   {'train' if train else 'infer'} "
                    f"{ms['ours']:9.2f}{ms['unfold']:9.1f}{ms['dense']:9.1f} | "
                    f"{min(ms['unfold'], ms['dense']) / ms['ours']:21.2f}x   | {memory['ours']:8.1f}"
                    f"{memory['unfold']:7.0f}{memory['dense']:6.0f} | {of_unfold:6.3f}",
                    flush=True,
                )


def by(path: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    with prefer(path):
        return ours(x, bias)


def all_pairs_by_flex(x: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = heads_first(x)
    return of_grid(flex_kernel(q, k, v, Everywhere(tuple(x.shape[1:3]))), x)


def all_pairs_by_sdpa(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return of_grid(F.scaled_dot_product_attention(*heads_first(x)), x)


def copy_rate() -> float:
    """Bytes a second that a plain copy reads and writes."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(race({"copy": partial(target.copy_, source)}, rounds=15)["copy"])


def on_the_gpu(size: int = 56, batch: int = 128, rounds: int = 15) -> None:
    """Write the table of RESULTS.md, on a machine with a GPU."""
    if not torch.cuda.is_available():
        print("no GPU here: the table in bfloat16 is not measured")
        return
    x = torch.randn(batch, size, size, 3 * HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    forms: dict[str, Form] = {f"neighborhood, {path}": partial(by, path) for path in ("natten", "flex", "eager")}
    try:
        forms["neighborhood, natten"](x[:1], None)
    except SaccadeError as error:
        print(error)
        del forms["neighborhood, natten"]
    expected = by("eager", x[:2])
    for form in forms.values():
        torch.testing.assert_close(form(x[:2], None), expected, rtol=3e-2, atol=3e-2)
    forms |= {"all pairs, FlexAttention": all_pairs_by_flex, "all pairs, SDPA": all_pairs_by_sdpa}
    once = x.nbytes / 3 / copy_rate()  # one of q, k, v moved once
    floors = {"inference": 4 * once, "training": 12 * once}  # back: q, k, v, out, its gradient; three gradients
    lines = []
    for kind, floor in floors.items():
        calls = {name: partial(step, form, x, None, kind == "training") for name, form in forms.items()}
        for name, seconds in race(calls, rounds=rounds, warmup=4).items():
            ms, memory = 1e3 * median(seconds), peak_memory(calls[name]) / 2**20
            lines.append(f"| {kind} | {name} | {ms:.2f} | {ms / (1e3 * floor):.1f} | {memory:.0f} |")
            print(lines[-1], flush=True)
    write_section("neighborhood on a GPU", "\n".join([
        "## Neighborhood attention on a GPU", "",
        f"`python -m benchmarks.neighborhood`: {torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, "
        f"{size}x{size} tokens, {HEADS} heads x {DIM}, window {WINDOW}, batch {batch}, medians of {rounds} alternating "
        f"rounds. The floor moves q, k, v and the output once ({1e3 * floors['inference']:.2f} ms at the rate of a "
        "copy), in training three times as much. Memory is the peak above the input.", "",
        "| pass | form | ms | times the floor | MiB |", "|---|---|--:|--:|--:|", *lines,
    ]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[14, 28, 56], help="none: the GPU alone")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    on_the_cpu(options.sizes, options.batch, options.rounds)
    on_the_gpu(rounds=options.rounds)


if __name__ == "__main__":
    main()
