"""`saccade compare`: models on your images under one rule, timed in one process, and what may be concluded.

All contestants see the same split, augmentation, optimizer, schedule and seeds. The learning rate of each is the one
of three with the best validation accuracy after a third of the epochs with the first seed, on a whole schedule of that
length; the test images are put to the final weights, once. A wall-time budget becomes a number of epochs, once, from
the speed of the first training steps, and is kept: a contest that was stopped and goes on trains the same number.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

import saccade
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.learn.data import ImageSet, open_images
from saccade.tools.contestants import Contestant, contestants, pretrained_contestants, reason, references, start_of
from saccade.tools.export import has_onnx
from saccade.tools.graphs import add_int8, latency_of, write_graphs
from saccade.tools.measure import ONNX
from saccade.tools.products import ship_winner
from saccade.tools.report import write_report
from saccade.tools.ship import FOLDER, HINT, Shipped
from saccade.tools.standings import Standing, advise, looks, race_all, row, table
from saccade.tools.trials import (
    RATES,
    Answers,
    Arena,
    check,
    choose_rate,
    device,
    probed_answers,
    reduced_answers,
    seconds_per_epoch,
    trained_answers,
    unlearned_answers,
)
from saccade.tools.watch import Bar, Watch

STARTS = ("scratch", "finetune", "probe")
DEFAULT_BUDGET = "7m"
MOST_EPOCHS = 300  # a budget buys no more
RESERVE, RESERVE_SECONDS = 0.1, 15.0  # of a budget, kept for the last stage
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Contest:
    """What `saccade compare` is asked for. With neither epochs nor budget it takes DEFAULT_BUDGET."""

    data: str = "tiles"
    models: tuple[str, ...] = ()
    img_size: int = 32
    epochs: int | None = None
    budget: str | None = None
    seeds: int = 3
    out: Path | None = None  # None: runs/DATA-DIGEST, a folder of its own for each contest
    mixers: tuple[str, ...] = ()
    start: str | None = None  # None: probe where every model has published weights, else scratch
    strict: bool = False
    batch_size: int = 64
    apply: tuple[str, ...] = ()  # methods, as in evit:keep=0.7, that every model is also shown with after training
    checkpoint: tuple[str, ...] = ()  # LABEL=FOLDER of pre-trainings, beside the models

    def __post_init__(self) -> None:
        for name in ("img_size", "seeds", "batch_size", "epochs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SaccadeError(f"{name} is {value}: it must be 1 or more")
        if self.epochs is not None and self.budget is not None:
            raise SaccadeError("epochs and budget say both how long to train: give one")
        if self.start not in (None, *STARTS):
            raise SaccadeError(f"start is {self.start!r}: it must be one of {', '.join(STARTS)}")
        if self.budget is not None:
            seconds(self.budget)

    @property
    def command(self) -> str:
        """The command line that asks for this contest."""
        said = [f"--{field.name.replace('_', '-')} {quote(_said(getattr(self, field.name)))}" for field in fields(self)
                if field.name not in ("data", "strict") and getattr(self, field.name) != field.default]
        return " ".join(["saccade compare", self.data, *said, *(["--strict"] if self.strict else [])])


def seconds(budget: str) -> float:
    """`90s`, `10m`, `1h`, `1.5h` in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", budget.strip())
    if found is None or float(found[1]) == 0:
        raise SaccadeError(f"budget is {budget!r}: write a time as in 90s, 10m or 1h")
    return float(found[1]) * UNITS[found[2]]


def compare(contest: Contest) -> dict[str, Any]:
    """Run a contest, or go on with one that was stopped; returns the results, which also lie in its folder.

    The last lines that it prints are the recommendation, where the report is and what there is to ship.

    The folder receives results.json, results.csv, report.html, best/ and runs/ with the weights of every seed as
    safetensors.
    A contestant that cannot be built or trained is listed with its reason, and the others go on. Raises SaccadeError
    for what can be known to be wrong before anything runs.
    """
    began, watch = time.monotonic(), Watch()
    named = pretrained_contestants(contest.checkpoint, contest.img_size)
    if contest.models or not named:
        named = [*contestants(contest.models, contest.mixers, contest.img_size, contest.apply), *named]
    start = contest.start or start_of(named)
    if start == "probe" and (contest.epochs or contest.budget):
        raise SaccadeError("a probe of frozen features trains no epochs: leave out epochs and budget, or give start "
                           "finetune or scratch")
    if start != "probe" and contest.epochs is None and contest.budget is None:
        contest = replace(contest, budget=DEFAULT_BUDGET)
    entrants = [*named, *references(contest.img_size, start)]
    if contest.out is not None:
        _writable(contest.out)
    with watch.waiting("reading the images"):
        images = open_images(contest.data, strict=contest.strict)
    rules = _rules(contest, start, entrants, images)
    digest = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:8]
    out = contest.out or Path("runs") / f"{images.name}-{digest}"
    with _claimed(out, rules):
        finished = out / "results.json"
        if finished.exists():
            results: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
            if _is_whole(results):
                return _told(results, out, watch)
        arena = Arena(images, out, start, contest.img_size, contest.batch_size, contest.seeds)
        try:
            return _told(_run(contest, arena, entrants, began, watch), out, watch)
        except KeyboardInterrupt:
            watch.line(f"stopped; the same command goes on from here ({out})")
            raise


def _is_whole(results: dict[str, Any]) -> bool:
    """Whether nothing is left to do: who failed gets another chance, and so do graphs once they can be written."""
    failed = any(one["failed"] for one in results["contestants"])
    return not failed and "best" in results and not (results["best"]["missing"] == HINT and has_onnx())


def _told(results: dict[str, Any], out: Path, watch: Watch) -> dict[str, Any]:
    watch.line(results["recommendation"]["sentence"])
    watch.line(f"{out / 'report.html'} shows how this was found")
    for line in Shipped.read(results["best"]).lines(out / FOLDER):
        watch.line(line)
    return results


def _run(contest: Contest, arena: Arena, entrants: list[Contestant], began: float, watch: Watch) -> dict[str, Any]:
    """All stages: check, plan, train, measure, write."""
    failed: dict[str, str] = {}
    networks = [each for each in entrants if each.build is not None]
    if arena.start != "probe":
        for entrant in networks:
            with _listed(entrant, failed, watch):
                check(arena, entrant)
        able = [each for each in networks if each.name not in failed and each.host is None]
        arena = replace(arena, epochs=_epochs(contest, arena, able, failed, began, watch))
    plain = [each for each in entrants if each.build is None]
    with watch.waiting("majority class and pixel k-NN"):
        found = {each.name: [one] for each, one in zip(plain, unlearned_answers(arena, plain), strict=True)}
    with watch.bar("training", sum(map(arena.work, networks))) as bar:
        for entrant in networks:
            if entrant.host is not None and entrant.host.name in failed:
                failed.setdefault(entrant.name, f"{entrant.host.name} failed")
            if entrant.name not in failed:
                with _listed(entrant, failed, watch):
                    found[entrant.name] = _answers(arena, entrant, bar, watch)
            bar.ended(arena.work(entrant))
    standings = [Standing(each, found.get(each.name, []), failed.get(each.name)) for each in entrants]
    with watch.bar("writing ONNX graphs", 1) as bar:
        graphs = write_graphs(arena, standings, bar.share)
    with watch.bar("measuring all in turn", 1) as bar:
        files = {name: each.files for name, each in graphs.items()}
        standings, numbers, models = race_all(arena, standings, files, bar.share)
    with watch.waiting("int8 on the test images"):
        add_int8(arena, graphs, numbers)
    seen: dict[str, Any] = {"images": [], "maps": {}}
    if arena.start != "probe":
        with watch.bar("drawing what they look at", 1) as bar:
            seen = looks(arena, models, bar.share)
    results: dict[str, Any] = {
        "saccade": saccade.__version__, "command": contest.command,
        "data": {"name": arena.images.name, "classes": arena.images.classes, "notes": arena.images.notes,
                 "counts": {name: len(getattr(arena.images, name)) for name in ("train", "val", "test")}},
        "settings": {"start": arena.start, "img_size": arena.img_size, "seeds": list(range(arena.seeds)),
                     "epochs": None if arena.start == "probe" else arena.epochs, "batch_size": arena.batch_size,
                     "learning_rates": list(RATES.get(arena.start, ())), "budget": contest.budget,
                     "threads": torch.get_num_threads(), "device": _device_name(), "latency": latency_of(graphs)},
        "contestants": [row(arena, each, numbers.get(each.entrant.name, {})) for each in standings],
        "recommendation": advise(arena, standings, numbers), "looks": seen}
    with watch.waiting("shipping the best"):
        results["best"] = asdict(_ship(results, arena, standings, models, files))
    with watch.waiting("writing the report"):
        write_whole(arena.out / "results.csv", table(results["contestants"]))
        write_report(results, arena.out / "report.html")
        write_whole(arena.out / "results.json", json.dumps(results, indent=1))  # last: it says that all is done
    return results


def _ship(
    results: dict[str, Any],
    arena: Arena,
    standings: Sequence[Standing],
    models: dict[str, nn.Module],
    files: dict[str, dict[str, Path]],
) -> Shipped:
    """The contestant that is recommended, in best/."""
    choice = results["recommendation"]["choice"]
    for standing, found in zip(standings, results["contestants"], strict=True):
        if found["name"] == choice:
            return ship_winner(arena, standing, found, models.get(choice), files.get(choice, {}).get(ONNX))
    return Shipped("", False, missing="nothing is shipped: no contestant finished")


def _answers(arena: Arena, entrant: Contestant, bar: Bar, watch: Watch) -> list[Answers]:
    """All seeds of one contestant; of one that takes a host's weights, once that is trained."""
    if arena.start == "probe":
        found = [probed_answers(arena, entrant)]
        watch.line(f"{entrant.name}: probed")
        return found
    if entrant.host is not None:
        return reduced_answers(arena, entrant)
    rate = choose_rate(arena, entrant, lambda done, what: bar.at(done, f"{entrant.name}, {what}"))
    found = []
    for seed in range(arena.seeds):
        before = arena.work(entrant) - (arena.seeds - seed) * arena.epochs

        def report(done: float, what: str, before: int = before) -> None:
            bar.at(before + done, f"{entrant.name}, {what}")

        found.append(trained_answers(arena, entrant, seed, rate, report))
        watch.line(f"{entrant.name}, seed {seed}: {100 * (found[-1].val_accuracy or 0):.1f} % on validation, "
                   f"{found[-1].seconds:.0f} s, learning rate {rate:g}")
    return found


@contextmanager
def _listed(entrant: Contestant, failed: dict[str, str], watch: Watch) -> Iterator[None]:
    """An error of one contestant becomes its reason; the others go on."""
    try:
        yield
    except Exception as error:  # a contestant's code may raise anything
        failed[entrant.name] = reason(error)
        watch.line(f"{entrant.name} failed: {failed[entrant.name]}")


def _epochs(contest: Contest, arena: Arena, able: Sequence[Contestant], failed: dict[str, str], began: float,
            watch: Watch) -> int:
    """How long everybody trains: as said, or what the budget allows at the speed that is measured here, once."""
    if contest.epochs is not None:
        return contest.epochs
    assert contest.budget is not None
    kept = arena.out / "plan.json"
    if kept.exists():
        return int(json.loads(kept.read_text())["epochs"])
    speeds: dict[str, float] = {}
    with watch.bar("measuring the speed of training", len(able)) as bar:
        for done, entrant in enumerate(able):
            with _listed(entrant, failed, watch):
                speeds[entrant.name] = seconds_per_epoch(arena, entrant)
            bar.at(done + 1)
    left = seconds(contest.budget) * (1 - RESERVE) - RESERVE_SECONDS - (time.monotonic() - began)

    def needed(epochs: int) -> float:
        planned = replace(arena, epochs=epochs)
        return sum(speeds[each.name] * planned.work(each) for each in able if each.name in speeds)

    epochs = max((number for number in range(1, MOST_EPOCHS + 1) if needed(number) <= left), default=1)
    if needed(epochs) > left:
        watch.line(f"one epoch of all needs about {needed(1):.0f} s, more than {contest.budget} leave: one is run")
    write_whole(kept, json.dumps({"epochs": epochs, "seconds_per_epoch": speeds}, indent=1))
    return epochs


def _rules(contest: Contest, start: str, entrants: Sequence[Contestant], images: ImageSet) -> dict[str, Any]:
    """All that decides a contest: a folder holds one such set of rules."""
    identities = {each.name: each.identity for each in entrants if each.identity}
    return {"images": f"{images.name} {images.fingerprint[:16]}", "models": list(contest.models),
            "mixers": list(contest.mixers), "apply": list(contest.apply), "img_size": contest.img_size,
            "epochs": contest.epochs,
            "budget": contest.budget, "seeds": contest.seeds, "start": start, "batch_size": contest.batch_size,
            "files": identities, "saccade": saccade.__version__, "device": _device_name(),
            **{package: version(package) for package in ("torch", "torchvision", "timm")}}


def _device_name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else "cpu"


def _writable(out: Path) -> None:
    """Make the folder, or say that it cannot be used."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / ".probe", "")
        (out / ".probe").unlink()
    except OSError as error:
        raise SaccadeError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if not (out / "contest.json").exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise SaccadeError(f"{out} has files in it that are no contest's: give an empty or a new folder as --out")


@contextmanager
def _claimed(out: Path, rules: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for these rules, against other contests and against a second run of this one.

    Sums depend in their last bits on the number of threads, so a contest keeps the number that it began with.
    """
    _writable(out)
    lock, card, threads = FileLock(out / ".lock"), out / "contest.json", torch.get_num_threads()
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SaccadeError(f"{out} is in use by another run: wait for its end, or give another --out") from error
    try:
        if not card.exists():
            write_whole(card, json.dumps({"rules": rules, "threads": threads}, indent=1))
        there = json.loads(card.read_text(encoding="utf-8"))
        changed = [f"{key} is {_said(there['rules'].get(key))} there and {_said(value)} here"
                   for key, value in rules.items() if there["rules"].get(key) != value]
        if changed:
            raise SaccadeError(f"{out} holds another contest ({'; '.join(changed)}): give another --out")
        torch.set_num_threads(there["threads"])
        yield
    finally:
        torch.set_num_threads(threads)
        lock.release()


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
