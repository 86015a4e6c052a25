"""What a forward costs: multiply-adds, memory and time, measured the same way for every model."""

from __future__ import annotations

import copy
import gc
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

EAGER, ONNX, INT8 = "PyTorch", "onnxruntime", "onnxruntime int8"  # what runs a network


def count_macs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Mathematical multiply-adds of one evaluation forward on `inputs`, the whole batch.

    Convolutions and matrix products count as in `torch.utils.flop_counter`, attention in its explicit form; elementwise
    arithmetic, normalisation and Fourier transforms do not. A copy of the model runs, in evaluation mode: without data
    where its operators allow that, which is quick whatever its size, else for real.
    """
    return without_data_or_real(_counted, model, inputs)


def declared_macs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiply-adds of a forward with each token mixer at its declared cost instead of what its fast path executes."""
    return without_data_or_real(_declared, model, inputs)


def without_data_or_real(
    count: Callable[[nn.Module, tuple[Any, ...]], int], model: nn.Module, inputs: tuple[Any, ...]
) -> int:
    """What `count` finds of a forward on tensors without data, or on real ones where the forward reads its data."""
    try:
        return count(without_data(model), tree_map_only(Tensor, lambda x: x.to("meta"), inputs))
    except Exception:  # what needs values (nonzero, item, numpy) fails, each in its own way; a true error comes again
        return count(copy.deepcopy(model), inputs)


def _declared(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    names = [name.removesuffix("mixer").removesuffix(".") for name, module in model.named_modules()
             if name.endswith("mixer") and hasattr(module, "cost")]
    blocks: dict[str, Any] = {f"{name}.mixer".lstrip("."): model.get_submodule(name) for name in names}
    given: dict[str, list[tuple[Tensor, Tensor | None]]] = {}  # what each mixer got, call by call: the grid, the prefix

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            prefix = named.get("prefix", inputs[1] if len(inputs) > 1 else None)
            given.setdefault(name, []).append((inputs[0], prefix))
        return hook

    for name, block in blocks.items():
        block.mixer.register_forward_pre_hook(keep(name), with_kwargs=True)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.eval()(*inputs)
    counts = {name.partition(".")[2]: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    total = int(counter.get_total_flops()) // 2
    for name, block in blocks.items():
        if name not in given:
            continue  # a method calls the mixer's projections itself
        mixer, total = block.mixer, total - counts.get(name, 0)
        for x, prefix in given[name]:
            beside = {"prefix": prefix.shape[1]} if prefix is not None and getattr(mixer, "prefix", False) else {}
            grid = tuple(x.shape[1:-1])
            total += x.shape[0] * mixer.cost(block.site, grid, **beside)
            total += mixer.shared_cost(block.site, grid) if hasattr(mixer, "shared_cost") else 0  # once for the batch
    return total


@torch.inference_mode(False)  # in whose tensors the counter of multiply-adds would look for a graph
def without_data(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device, made without copying its data."""
    known: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    known |= {id(weight): nn.Parameter(weight.to("meta"), weight.requires_grad) for weight in model.parameters()}
    return copy.deepcopy(model, known)


@torch.inference_mode(False)
def _counted(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _lstm_flops})
    # The counter's formulas for fused attention refuse grouped heads and do not know nn.Transformer's fast path.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _slow_transformer(), counter:
        model.eval()(*inputs)
    return int(counter.get_total_flops()) // 2


def _lstm_flops(
    x: Sequence[int], weight_input: Sequence[int], weight_hidden: Sequence[int], *_: Any, **__: Any
) -> int:
    """One direction of one layer of oneDNN's LSTM, for which the counter has no formula; x is (steps, B, C)."""
    return 2 * x[0] * x[1] * (prod(weight_input) + prod(weight_hidden))


@contextmanager
def _slow_transformer() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes allocated at the highest moment of `function()`, above what was allocated at its start.

    On the CPU from the allocator's events in torch.profiler, on a GPU from the counters of its allocator; neither sees
    the scratch space that oneDNN takes from the system by itself.
    """
    gpu = _gpu_in_use()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler announces its start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = function()
    del result
    if gpu and (grown := torch.cuda.max_memory_allocated() - start) > 0:
        return int(grown)
    assert watched.profiler is not None
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def race(
    functions: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, run in turn (A B C, B C A, ...) so that noise meets them alike.

    The i-th entries of two functions belong to the same round, so ratios are taken round by round. After each round
    `progress(done, rounds)` is called. The caller sets threads and `torch.inference_mode()`.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    synchronize = torch.cuda.synchronize if _gpu_in_use() else _nothing
    for function in chain.from_iterable([functions.values()] * warmup):
        function()
    with _no_garbage_collection():
        for done in range(rounds):
            gc.collect(0)
            for name in _rotated(names, done):
                synchronize()
                start = perf_counter()
                functions[name]()
                synchronize()
                seconds[name].append(perf_counter() - start)
            if progress:
                progress(done + 1, rounds)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile: {"p50", "p95"}, in the unit that came in."""
    middle, late = np.percentile(np.asarray(seconds, dtype=np.float64), [50, 95])
    return {"p50": float(middle), "p95": float(late)}


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Run the block with so many threads of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conditions() -> str:
    """What a latency on this processor depends on: "one picture, 2 threads, AMD EPYC"."""
    threads = torch.get_num_threads()
    return f"one picture, {threads} thread{'s' * (threads != 1)}, {processor()}"


def processor() -> str:
    """What the processor of this machine calls itself."""
    try:
        said = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")]
    except OSError:
        said = []
    return said[0] if said else platform.processor() or platform.machine()


def _gpu_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())


def _rotated(names: list[str], by: int) -> Iterable[str]:
    by %= max(len(names), 1)
    return names[by:] + names[:by]


def _nothing() -> None:
    pass


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
