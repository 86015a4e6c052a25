"""Neighborhood attention beside its two textbook forms: one process, one thread, alternating, medians, peak memory.

    python benchmarks/neighborhood.py
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.neighborhood import neighborhood_attention

HEADS, DIM, WINDOW = 4, 32, 7
Form = Callable[[Tensor, Tensor | None], Tensor]


def tiled(x: Tensor, bias: Tensor | None) -> Tensor:
    """Ours. x (B, H, W, 3 C), one projection's output; bias (h, 2 k - 1, 2 k - 1)."""
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
        B, H, W, _ = x.shape
        q, k, v = x.view(B, H * W, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        mask = self.mask if bias is None else self.mask + bias.flatten(1)[:, self.index]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, H, W, HEADS, DIM)


def step(form: Form, x: Tensor, bias: Tensor | None, train: bool) -> None:
    if train:
        leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
        torch.autograd.grad(form(leaves[0], None if bias is None else leaves[1]).sum(), leaves)
    else:
        with torch.no_grad():
            form(x, bias)


def medians(calls: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Milliseconds of processor time; the calls take turns, so that a busy machine is unfair to all of them alike.

    Each is called once untimed before: none pays for the caches that another emptied.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seen in zip(calls, times, strict=True):
            call()
            begin = time.process_time()
            call()
            seen.append(1e3 * (time.process_time() - begin))
    return [statistics.median(seen) for seen in times]


def peak(call: Callable[[], None]) -> float:
    """MiB of tensors alive at once, above those alive before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[14, 28, 56])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{HEADS} heads x {DIM}, window {WINDOW}, batch {options.batch}, float32, one thread; ms, MiB")
    print("grid   bias  pass       ours   unfold    dense | faster than the better | MiB ours unfold dense | of unfold")
    for size in options.sizes:
        forms: list[Form] = [tiled, Unfold(size), Dense(size)]
        x = torch.randn(options.batch, size, size, 3 * HEADS * DIM)
        for bias in (None, torch.randn(HEADS, 2 * WINDOW - 1, 2 * WINDOW - 1)):
            outputs = [form(x, bias) for form in forms]
            for output in outputs[1:]:
                torch.testing.assert_close(outputs[0], output, rtol=1e-4, atol=1e-5)
            for train in (False, True):
                calls = [functools.partial(step, form, x, bias, train) for form in forms]
                ours, *others = medians(calls, options.repeats)
                memory = [peak(call) for call in calls]
                print(
                    f"{size:>2}x{size:<3} {'no ' if bias is None else 'yes'}   {'train' if train else 'infer'} "
                    f"{ours:9.2f}{others[0]:9.1f}{others[1]:9.1f} | {min(others) / ours:21.2f}x   | "
                    f"{memory[0]:8.1f}{memory[1]:7.0f}{memory[2]:6.0f} | {memory[0] / max(memory[1], 0.1):6.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
