"""Models raced within one process, against each other or against timm's with the same weights (`saccade bench`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.errors import SaccadeError
from saccade.core.index import index, resolve_model
from saccade.core.load import load
from saccade.core.optional import optional
from saccade.learn.restoration.runs import restores
from saccade.tools.measure import count_macs, limited_threads, peak_memory, race, summary
from saccade.tools.roofline import floor, moved_bytes, rates, scan_states, yardsticks

timm = optional("timm", extra="train")

Progress = Callable[[str, int, int], None]  # what runs, rounds done, rounds


def bench(
    names: Sequence[str],
    *,
    against: str | None = None,
    batch: Sequence[int] = (1, 8),
    size: int = 224,
    threads: int = 1,
    rounds: int = 15,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """One row a model and batch size: time of a forward, images a second, memory, parameters, multiply-adds, and the
    floor: the least seconds that its arithmetic and bytes take on this machine (`tools.roofline`).

    The models of a batch size take turns, round by round; with `against="timm"` each takes turns with timm's model of
    the same name and the same weights instead, and its row says the ratios ours / theirs: of time, the median of the
    rounds' ratios, and of memory. `difference` is the largest difference of the outputs, relative to the largest.
    All in float32 on the CPU, inference mode. Raises SaccadeError for names that we or timm do not know.
    """
    if against not in (None, "timm"):
        raise SaccadeError(f"against={against!r}: models race against each other (nothing) or against 'timm'")
    if not names or min(rounds, threads, size, *batch) < 1:
        raise SaccadeError(f"nothing to measure in names={list(names)}, batch={list(batch)}, size={size}, "
                           f"threads={threads}, rounds={rounds}: give at least one model, and numbers from 1")
    rows: list[dict[str, Any]] = []
    with limited_threads(threads), torch.inference_mode():
        for group in [[name] for name in names] if against else [list(names)]:
            models, note = _models(group, against, size)
            for count in batch:
                say = partial(progress, f"{', '.join(group)}, batch {count}") if progress else None
                rows += _rows(group, models, torch.randn(count, 3, size, size), rounds, say, note)
    order = {(name, count): place for place, (name, count) in enumerate((n, b) for n in names for b in batch)}
    return sorted(rows, key=lambda row: order[row["model"], row["batch"]])


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `bench` as a table for the terminal."""
    raced = any("other" in row for row in rows)
    shown = Table(*("model", "batch", "ms", "images/s", "peak MB", "params M", "GMACs/image", "floor ms"))
    for column in shown.columns[1:]:
        column.justify = "right"
    if raced:
        for title in ("timm ms", "time / timm's", "memory / timm's"):
            shown.add_column(title, justify="right")
    for row in rows:
        cells = [
            row["model"], str(row["batch"]), f"{row['p50'] * 1e3:.1f}", f"{row['throughput']:.1f}",
            f"{row['peak_memory'] / 1e6:.1f}", f"{row['params'] / 1e6:.2f}", f"{row['macs'] / row['batch'] / 1e9:.3f}",
            f"{row['floor'] * 1e3:.1f}",
        ]
        if raced:
            cells += [f"{row['other_p50'] * 1e3:.1f}", f"{row['ratio']:.2f}", f"{row['memory_ratio']:.2f}"]
        shown.add_row(*cells)
    notes = dict.fromkeys(f"{row['model']}: {row['note']}" for row in rows if row["note"])
    shown.caption = "\n".join(notes) or None
    return shown


def timm_name(name: str) -> str | None:
    """timm's name of one of our models, or None: an alias on its card, else the name that both use."""
    ours = resolve_model(name)
    aliases = [alias for alias, model in index()["aliases"].items() if model == ours]
    return next((each for each in (*aliases, ours) if timm.models.is_model(each)), None)


def pair(name: str, size: int = 224) -> tuple[nn.Module, nn.Module, str]:
    """Our model and timm's, in evaluation mode, with the same random weights, and what is to be noted of them."""
    other = timm_name(name)
    if other is None:
        raise SaccadeError(f"timm has no model that is {name!r}: leave --against out")
    settings = timm.models.get_pretrained_cfg(other)
    resized = settings.fixed_input_size and settings.input_size[-1] != size
    theirs = timm.create_model(other, **{"img_size": size} if resized else {}).eval()
    ours = create_model(name, img_size=size).eval()
    if not 0.98 < _params(ours) / _params(theirs) < 1.02:
        raise SaccadeError(f"timm's {other} is another model: {_params(theirs)} parameters, ours has {_params(ours)}")
    try:
        with torch.no_grad():
            theirs(torch.zeros(1, settings.input_size[0], size, size))
    except RuntimeError as reason:  # some take their own size alone
        raise SaccadeError(f"timm's {other} does not run at {size} pixels ({reason}): leave --against out") from None
    with torch.no_grad():  # initial layer scales are so small that a wrong branch would not show in the output
        for weight in theirs.parameters():
            weight += 0.1 * torch.rand_like(weight) if weight.ndim == 1 else 0
    try:
        load(ours, theirs.state_dict())
    except SaccadeError as reason:
        return ours, theirs, f"weights differ ({reason})"
    return ours, theirs, ""


def _models(names: Sequence[str], against: str | None, size: int) -> tuple[dict[str, nn.Module], str]:
    if against:
        ours, theirs, note = pair(names[0], size)
        return {names[0]: ours, f"timm:{timm_name(names[0])}": theirs}, note
    # what restores pictures has no native size
    options: dict[str, dict[str, Any]] = {name: {} if restores(name) else {"img_size": size} for name in names}
    return {name: create_model(name, **options[name]).eval() for name in names}, ""


def _rows(
    names: Sequence[str],
    models: dict[str, nn.Module],
    images: Tensor,
    rounds: int,
    progress: Callable[[int, int], None] | None,
    note: str,
) -> Iterator[dict[str, Any]]:
    forwards: dict[str, Callable[[], Any]] = {name: partial(model, images) for name, model in models.items()}
    seconds = race(forwards | yardsticks(), rounds=rounds, progress=progress)
    peaks = {name: peak_memory(forward) for name, forward in forwards.items()}
    for name in names:
        row: dict[str, Any] = {"model": name, "batch": len(images)} | summary(seconds[name])
        macs, moved = count_macs(models[name], (images,)), moved_bytes(models[name], (images,))
        least = floor(macs, moved, rates(seconds), scan_states(models[name], (images,)))
        row |= {"throughput": len(images) / row["p50"], "peak_memory": peaks[name], "params": _params(models[name]),
                "macs": macs, "note": note, "floor": least}
        for other in models.keys() - set(names):
            row |= {"other": other, "other_p50": summary(seconds[other])["p50"], "other_peak_memory": peaks[other]}
            row["ratio"] = median(ours / theirs for ours, theirs in zip(seconds[name], seconds[other], strict=True))
            row["memory_ratio"] = peaks[name] / peaks[other]
            row["difference"] = None if note else _difference(forwards[name](), forwards[other]())
        yield row


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _params(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
