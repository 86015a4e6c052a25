"""`saccade restore`: a picture, or a folder of them, through a network that restores pictures.

What is there is never overwritten unless asked for, each file is written as a whole or not at all, and the same command
goes on where it was stopped: in a folder, pictures that are there already are kept and named.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saccade.core.build import create_model
from saccade.core.checkpoint import read_checkpoint
from saccade.core.errors import SaccadeError
from saccade.core.files import sha256_of, write_whole
from saccade.core.index import index, model_paper, paper_module, resolve_model
from saccade.core.load import load
from saccade.learn.restoration.patches import pictures_in
from saccade.learn.restoration.pictures import check_holds, read_picture, write_picture
from saccade.learn.restoration.restore import Tiles, restore_picture
from saccade.learn.restoration.runs import opened, restores
from saccade.learn.restoration.tiling import Network, check_tiles
from saccade.tools.watch import Bar, Watch

SETTINGS = "restored.json"  # in the folder of results: how they were made


@dataclass(frozen=True)
class Restoration:
    """What is restored, to where, by what."""

    source: Path
    target: Path
    model: str | None  # None: as the checkpoint says, a folder that `saccade train` made
    checkpoint: Path
    tiles: Tiles = Tiles()
    force: bool = False


def restore(job: Restoration, watch: Watch) -> list[Path]:
    """Restore a picture or all pictures of a folder and its sub-folders; returns the files written.

    Raises SaccadeError before anything is computed for a model, checkpoint, tile or name that cannot be used, at once
    where nothing can be written any more, and at the end of a folder some of whose pictures could not be restored.
    """
    pairs = _pairs(job)
    name, weights = opened(job.checkpoint, job.model)
    model = open_restorer(name, weights)
    check_tiles(job.tiles.tile, job.tiles.overlap, getattr(model, "multiple", 1))
    if job.source.is_dir():
        _claim(job, name, weights)
    written, failures, kept = [], 0, 0
    with watch.bar("restoring", len(pairs)) as bar:
        for number, (source, target) in enumerate(pairs):
            bar.at(number, source.name)
            if job.source.is_dir() and target.exists() and not job.force:
                kept += 1
                continue
            try:
                watch.line(_restore_file(model, source, target, job, bar, number))
                written.append(target)
            except _NotWritten:
                raise
            except SaccadeError as error:
                if not job.source.is_dir():
                    raise
                watch.line(f"failed: {error}")
                failures += 1
    if kept:
        watch.line(f"{kept} of {len(pairs)} were in {job.target} already and are kept; --force makes them anew")
    if failures:
        raise SaccadeError(f"{failures} of {len(pairs)} pictures could not be restored (named above); "
                           f"the others are in {job.target}")
    return written


class _NotWritten(SaccadeError):
    """Nothing can be written any more: going on with the next picture is of no use."""


def _restore_file(model: Network, source: Path, target: Path, job: Restoration, bar: Bar, number: int) -> str:
    began, picture, scale = time.perf_counter(), read_picture(source), model.scale
    check_holds(target, picture, scale)
    height, width = picture.pixels.shape[:2]
    try:
        made = restore_picture(model, picture, job.tiles, lambda done, of: bar.at(number + done / of, source.name))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # the CPU's has no type
            raise
        raise SaccadeError(f"{source}: not enough memory for {width}x{height} pixels; give a smaller --tile than "
                           f"{job.tiles.tile}, or cut the picture into parts") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_picture(target, made)
    except OSError as error:
        raise _NotWritten(f"{target} could not be written ({error.strerror or error}): nothing was changed; make room "
                          "and give the same command again, it goes on from here") from error
    return (f"{target}: {width}x{height} -> {width * scale}x{height * scale}, {picture.kind}, "
            f"{time.perf_counter() - began:.1f} s")


def open_restorer(name: str, checkpoint: Path) -> Network:
    """A registered model of restoration with trained weights, in evaluation mode, on the GPU where there is one.

    Raises SaccadeError for another kind of model, and for a checkpoint that does not fit, with the name that it fits.
    """
    if not restores(name):
        models = [one for one in index()["models"] if restores(one)]
        raise SaccadeError(f"{name} does not restore pictures; these do: {', '.join(sorted(models))}")
    model: Any = create_model(name)
    state = read_checkpoint(checkpoint)
    try:
        load(model, state)
    except SaccadeError as error:
        other = _fitting(name, state)
        if other is None:
            raise SaccadeError(f"{checkpoint}: {error}") from error
        raise SaccadeError(f"{checkpoint} is a checkpoint of {other}, not of {name}: give --model {other}") from error
    restorer: Network = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return restorer


def _fitting(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Another size of the same paper that the weights fit, as one of another scale; None where there is none."""
    for other in paper_module(model_paper(name)).SIZES:
        if other != resolve_model(name):
            with torch.device("meta"):  # shapes without numbers
                model = create_model(other)
            try:
                load(model, state)
            except SaccadeError:
                continue
            return str(other)
    return None


def _pairs(job: Restoration) -> list[tuple[Path, Path]]:
    """Each picture with the file that it becomes."""
    source, target = job.source, job.target
    if not source.exists():
        raise SaccadeError(f"{source}: there is no such file or folder")
    if source.is_dir():
        if target.resolve() == source.resolve() or (target.exists() and not target.is_dir()):
            raise SaccadeError(f"{target}: the results of a folder need another folder of their own")
        inside = target.resolve()
        files = pictures_in(source, lambda path: path.is_file() and not path.name.startswith(".")
                            and inside not in path.resolve().parents)
        return [(path, target / path.relative_to(source)) for path in files]
    if target.is_dir():
        target = target / source.name
    if target.exists() and target.resolve() == source.resolve():
        raise SaccadeError(f"{target} is the picture itself: give another name, the original stays")
    if target.exists() and not job.force:
        raise SaccadeError(f"{target} is there already: --force overwrites it")
    return [(source, target)]


def _claim(job: Restoration, name: str, weights: Path) -> None:
    """Write how the results in this folder are made, or make sure that those in it were made in the same way."""
    said = weights.name if weights.is_dir() else sha256_of(weights)
    mine = {"model": resolve_model(name), "checkpoint": said, "tile": job.tiles.tile,
            "overlap": job.tiles.overlap, "self_ensemble": job.tiles.ensemble}
    path = job.target / SETTINGS
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = mine
    there = there if isinstance(there, dict) else {}
    different = [f"{key} is {there.get(key)} there and {mine[key]} here" for key in mine if there.get(key) != mine[key]]
    if different and not job.force:
        raise SaccadeError(f"{job.target} holds results made otherwise ({'; '.join(different)}): "
                           "choose another folder, or --force to make all anew")
    try:
        job.target.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mine, indent=1))
    except OSError as error:
        raise SaccadeError(f"{job.target} cannot be written ({error.strerror}): choose another folder") from error
