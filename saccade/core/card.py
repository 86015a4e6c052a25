"""What the library knows of a paper, as data: the source of `list`, `find`, `info`, the README's table, the tests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Weights:
    """Trained weights that the authors published: where they lie, what they are and under which licence."""

    url: str
    sha256: str = "unknown"
    data: str = "ImageNet-1K"
    licence: str = "unknown"
    layout: str = "authors"


@dataclass(frozen=True)
class Card:
    """One published system (or one file that serves several).

    `systems` are the mission's slugs. `mixers` maps a mechanism's name to its class in the same file; `methods` that of
    what is done to a model (`apply`, `explain`, pre-training: the kinds say which) to its function. `params`, `macs`
    and `top1` are what the paper's tables say, by model name (parameters and multiply-adds at the published size; top-1
    in percent on ImageNet-1K). `read` says what the file was written from. `aliases` maps other names (timm's) to ours.
    `goldens` and `tests` name the proof; a card with neither is implemented but not verified.
    """

    title: str
    authors: str
    year: int
    systems: tuple[str, ...] = ()
    arxiv: str = ""
    code: str = ""
    licence: str = "unknown"
    weights_licence: str = "unknown"
    read: str = "paper"
    keywords: str = ""
    kinds: tuple[str, ...] = ("backbone",)
    mixers: dict[str, str] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    params: dict[str, float] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    goldens: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
