"""From a name to its paper, read from the generated `index.json`; a paper is imported when it is used.

`python -m saccade.tools.catalog` writes the index from the cards; a test fails when it is stale.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from functools import lru_cache
from importlib import import_module, resources
from types import ModuleType
from typing import Any

from saccade.core.errors import SaccadeError
from saccade.core.names import closest, matching, spellings


@lru_cache(maxsize=1)
def index() -> dict[str, Any]:
    """`{"models": {name: paper}, "mixers": ..., "methods": ..., "aliases": {name: model}, "papers": {paper: card}}`."""
    file = resources.files("saccade") / "index.json"
    return json.loads(file.read_text(encoding="utf-8"))


def paper_module(paper: str) -> ModuleType:
    """The file of a paper, imported."""
    return import_module(f"saccade.papers.{paper}")


def resolve_model(name: str) -> str:
    """The registered name of a model that may be given by an alias or by the other spelling of its size."""
    known = index()
    for spelling in spellings(name):
        if spelling in known["models"]:
            return spelling
        if spelling in known["aliases"]:
            return str(known["aliases"][spelling])
    hint = closest(name, [*known["models"], *known["aliases"]])
    if name in known["mixers"]:
        hint = f"; it is a mixer: create_model(BACKBONE, mixer={name!r})"
    raise SaccadeError(f"there is no model {name!r}{hint or '; `saccade list` shows all'}")


def model_paper(name: str) -> str:
    """The paper file that a registered model comes from."""
    return str(index()["models"][resolve_model(name)])


def is_backbone(name: str) -> bool:
    """Whether a registered model classifies and gives feature maps (those that restore pictures do neither)."""
    return "backbone" in index()["papers"][model_paper(name)]["kinds"]


def mixer_paper(name: str) -> str:
    """The paper file that a mixer comes from."""
    known = index()["mixers"]
    if name not in known:
        hint = closest(name, known) or "; `saccade list --kind mixer` shows all"
        raise SaccadeError(f"there is no mixer {name!r}{hint}")
    return str(known[name])


def method(name: str, kind: str) -> Any:
    """The function of a method that a card of this kind declares (`apply`'s are of kind "token reduction")."""
    known = index()
    names = {key: paper for key, paper in known["methods"].items() if kind in known["papers"][paper]["kinds"]}
    if name not in names:
        raise SaccadeError(f"there is no {kind} method {name!r}{closest(name, names)}; there are {', '.join(names)}")
    module = paper_module(names[name])
    return getattr(module, module.CARD.methods[name])


def method_with(name: str, kind: str, options: Collection[str]) -> Any:
    """The function of a method, which takes a model and these options; SaccadeError for an option that it has not."""
    function = method(name, kind)
    known = [key for key in inspect.signature(function).parameters if key != "model"]
    for key in options:
        if key not in known:
            raise SaccadeError(f"method {name!r} has no option {key!r}{closest(key, known) or f'; it has {known}'}")
    return function


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that a shell pattern picks, sorted: `list_models("*former*")`."""
    return sorted(matching(index()["models"], pattern))


def list_mixers(pattern: str = "*") -> list[str]:
    """Names of the token mixers that a shell pattern picks, sorted."""
    return sorted(matching(index()["mixers"], pattern))


def find(words: str) -> list[str]:
    """Papers whose card speaks of all `words` (title, authors, keywords, mixers, models), the best match first."""
    wanted = words.lower().replace("-", " ").split()

    def score(paper: str, card: dict[str, Any]) -> int:
        names = " ".join([paper, *(name for kind in ("mixers", "methods", "models", "aliases") for name in card[kind])])
        names = names.lower().replace("_", " ")
        text = " ".join([card["title"], card["keywords"], card["authors"], card["arxiv"]]).lower().replace("-", " ")
        if not all(word in names or word in text for word in wanted):
            return 0
        return sum(2 * (word in names) + (word in text) for word in wanted)

    scores = {paper: score(paper, card) for paper, card in index()["papers"].items()}
    return sorted((paper for paper in scores if scores[paper]), key=lambda paper: (-scores[paper], paper))
