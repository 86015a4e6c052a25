"""Trained weights: which exist, where they are on this machine, and that they are those that were first used."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from saccade.core.card import Weights
from saccade.core.download import Unreachable, WrongHash, cache_folder, fetch, place
from saccade.core.errors import SaccadeError
from saccade.core.files import copy_whole, sha256_of, write_whole
from saccade.core.index import index, model_paper, resolve_model
from saccade.core.load import LAYOUTS, load

LOCK = "weights.lock.json"
PERMISSIVE = frozenset(("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "BSD-3-Clause-Clear", "ISC", "CC0-1.0"))
READ = ("saccade", *LAYOUTS)
# Places that show a page where a person presses a button.
BY_HAND = ("drive.google.com", "1drv.ms", "pan.baidu.com", "mega.nz", ".sharepoint.com")


@dataclass(frozen=True)
class Hub:
    """A file on the Hugging Face hub."""

    repository: str
    file: str
    revision: str | None


def list_weights() -> list[str]:
    """Names of all models with trained weights."""
    return sorted(name for card in index()["papers"].values() for name in card["weights"])


def published(name: str) -> Weights:
    """The trained weights of a model as its card has them; SaccadeError where no address is known."""
    name = resolve_model(name)
    entry = index()["papers"][model_paper(name)]["weights"].get(name)
    if entry is None:
        raise SaccadeError(f"{name}: no address of trained weights is known; give checkpoint_path")
    facts: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Weights(**facts)


def status(name: str) -> str:
    """What is known of a model's weights: claimed, layout proven by golden, or reproduced (who, when, top-1)."""
    name, weights = resolve_model(name), published(name)
    if weights.reproduced:
        return f"reproduced ({weights.reproduced})"
    golden = name in index()["papers"][model_paper(name)]["goldens"] and weights.layout == "authors"
    return "layout proven by golden" if golden else "claimed"


def is_permissive(name: str) -> bool:
    """Whether a model has weights under a permissive licence."""
    name = resolve_model(name)
    return name in index()["papers"][model_paper(name)]["weights"] and permits(published(name).licence)


def permits(licence: str) -> bool:
    """Whether a licence, by its SPDX name in letters of any case, is a permissive one."""
    return licence.lower() in map(str.lower, PERMISSIVE)


def is_obtainable(name: str) -> bool:
    """Whether `pretrained=True` can have a model's weights without a person's help."""
    name = resolve_model(name)
    if name not in index()["papers"][model_paper(name)]["weights"]:
        return False
    weights = published(name)
    places = (weights.source, *weights.mirrors)
    return weights.layout in READ and (not all(map(_by_hand, places)) or cached_file(name) is not None)


def identified(digest: str) -> str | None:
    """The model whose trained weights have this sha256, by its card or the lock of the first use; None for no one's."""
    for name in list_weights():
        expected = _expected(published(name))
        if expected is not None and digest.startswith(expected):
            return name
    return None


def hub(source: str) -> Hub | None:
    """What `hf:OWNER/NAME/FILE@REVISION` or `timm:NAME.TAG@REVISION` says, None for another source."""
    kind, _, rest = source.partition(":")
    where, _, revision = rest.partition("@")
    if kind == "timm" and where:
        return Hub(f"timm/{where}", "model.safetensors", revision or None)
    if kind == "hf" and where.count("/") >= 2:
        owner, name, file = where.split("/", 2)
        return Hub(f"{owner}/{name}", file, revision or None)
    return None


def pinned(source: str) -> str:
    """The source at the commit that the hub gave at its first use on this machine; as it is where there is none."""
    found, lock = hub(source), _locked(source)
    return f"{source.partition('@')[0]}@{lock['revision']}" if found and lock and "revision" in lock else source


def file_name(source: str) -> str:
    """The name of the file that a source gives."""
    found = hub(source)
    return place(source).name if found is None else found.file.rpartition("/")[2]


def weights_file(name: str) -> Path:
    """The file of a model's trained weights, downloaded unless it is on this machine.

    What was imported comes first, then the source and its mirrors in turn. The hash must be the card's or, where that
    is unknown, the one of the first use, which is kept in `weights.lock.json` in the cache. So is the commit of a file
    on the hub: it comes from there ever after, whatever is put on its branch.

    Raises SaccadeError where there are no weights, no place answers, or the hash is another.
    """
    weights = published(name)
    if weights.layout not in READ:
        raise SaccadeError(f"{name}: {weights.source} is a {weights.layout} checkpoint, which is not read: convert it, "
                           "then give checkpoint_path")
    places = (weights.source, *weights.mirrors)
    lock, expected = _locked(weights.source), _expected(weights)
    problems: list[str] = []
    for source in sorted(places, key=lambda source: not place(source).is_file()):
        try:
            path = _get(source, expected)
        except WrongHash as problem:
            if lock is None or lock["sha256"] != expected:
                raise
            since = f"it was the other at its first use on {lock['first_used']}, says {cache_folder() / LOCK}"
            raise SaccadeError(f"{problem}; {since}") from None
        except Unreachable as problem:
            problems.append(str(problem))
            continue
        _remember(weights, path, source)
        return path
    raise SaccadeError(f"{name}: {'; '.join(problems)}")


def cached_file(name: str) -> Path | None:
    """The file of a model's trained weights where it is on this machine already."""
    weights = published(name)
    for source in (weights.source, *weights.mirrors):
        if place(source).is_file():
            return place(source)
        if (found := hub(pinned(source))) is not None:
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(found.repository, found.file, revision=found.revision)
            if isinstance(path, str):
                return Path(path)
    return None


def import_weights(file: Path, name: str | None = None) -> tuple[str, Path]:
    """Takes a file that the user downloaded as the weights of a model; returns the model and the file in the cache.

    Without `name` the model is the one whose source has the file's name. The file must load, every entry accounted for,
    and have the hash that is known, if one is.
    """
    from saccade.core.build import create_model

    if not file.is_file():
        raise SaccadeError(f"{file}: no such file; give the checkpoint that you downloaded")
    if name is None:
        named = [known for known in list_weights() if file_name(published(known).source) == file.name]
        if len(named) != 1:
            some = f" ({', '.join(named[:4])}{', ...' if len(named) > 4 else ''})" if named else ""
            raise SaccadeError(f"{file.name} is the file of {len(named)} models{some}; say which with --model")
        name = named[0]
    weights, found = published(name), sha256_of(file)
    expected = _expected(weights)
    if expected is not None and not found.startswith(expected):
        raise SaccadeError(f"{file}: its sha256 is {found}, that of {name} is {expected}; download it again")
    load(create_model(name), file)
    path = place(weights.source)
    path.parent.mkdir(parents=True, exist_ok=True)
    copy_whole(file, path)
    _remember(weights, path, weights.source)
    return resolve_model(name), path


def _get(source: str, expected: str | None) -> Path:
    """The file of one place; Unreachable where it cannot be had, WrongHash where it is another."""
    kept, found = place(source), hub(pinned(source))
    if found is None and not kept.is_file():
        if _by_hand(source):
            remedy = "download it in a browser, then `saccade weights import FILE --model NAME`"
            raise Unreachable(f"{source} is a page: {remedy}")
        return fetch(source, expected)
    path = _from_hub(source, found) if found is not None and not kept.is_file() else kept
    if expected is not None and not (digest := sha256_of(path)).startswith(expected):
        if path == kept:
            kept.unlink()
        remedy = "removed, get it again" if path == kept else "remove it and get it again"
        raise WrongHash(f"{source}: the sha256 of {path} is {digest}, not {expected}; {remedy}")
    return path


def _by_hand(source: str) -> bool:
    return (urlsplit(source).hostname or "").endswith(BY_HAND)


def _from_hub(source: str, found: Hub) -> Path:
    from huggingface_hub import hf_hub_download

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of each of its tries; the last one's error says it all
    try:
        return Path(hf_hub_download(found.repository, found.file, revision=found.revision,
                                    endpoint=os.environ.get("HF_ENDPOINT")))
    except Exception as problem:  # of requests, httpx and its own, from version to version
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        raise Unreachable(f"{source}: {type(problem).__name__}: {lines[0] if lines else ''}") from problem
    finally:
        log.setLevel(level)


def _expected(weights: Weights) -> str | None:
    """The hash, or its first digits, that a file must have: the card's and, once it was used, that of the first use."""
    card = "" if weights.sha256 == "unknown" else weights.sha256.lower()
    lock = _locked(weights.source)
    known: str = lock["sha256"] if lock else ""
    return (known if known.startswith(card) else card) or None


def _locked(source: str) -> Any:
    return _locks().get(source)


def _locks() -> dict[str, Any]:
    path = cache_folder() / LOCK
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {source: {"sha256": entry["sha256"], **entry} for source, entry in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise SaccadeError(f"{path}: damaged ({problem}); mend it, or remove it to trust the files anew") from None


def _remember(weights: Weights, path: Path, source: str) -> None:
    """Writes the first use of weights, whose file `source` gave, to the lock file, after its size was checked."""
    size = path.stat().st_size
    if weights.bytes not in (None, size):
        remedy = "remove it and get it again"
        raise SaccadeError(f"{weights.source}: {path} has {size} bytes, not {weights.bytes}; {remedy}")
    if _locked(weights.source):
        return
    entry = {"sha256": sha256_of(path), "bytes": size, "first_used": date.today().isoformat()}
    found = hub(source)
    if found is not None and source == weights.source and path != place(source):
        entry["revision"] = path.parents[found.file.count("/")].name  # the hub's cache keeps a folder a commit
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / f".{LOCK}.lock"):
        locks = _locks()
        if weights.source not in locks:
            write_whole(cache_folder() / LOCK, json.dumps(locks | {weights.source: entry}, indent=1))
