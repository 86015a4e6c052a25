"""What the library knows of a paper, as data: the source of `list`, `find`, `info`, the README's table, the tests."""

from __future__ import annotations

from dataclasses import dataclass, field

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Weights:
    """Trained weights that exist: where they lie, what they are, how they are evaluated and under which licence.

    `source` is the authors' address, `hf:OWNER/NAME/FILE@REVISION` or `timm:NAME.TAG@REVISION` (without a revision:
    main); where it is a page with several files, `#MODEL` tells them apart. `mirrors` are further places of the same
    bytes. `sha256` may be the first digits, which torch's habit puts into a file's name. An evaluation scales the
    shorter side to `img_size` / `crop` by `interpolation`, takes the central square, and normalises by `mean` and
    `std`; the defaults are those of DeiT's and Swin's code, `img_size` None is the model's own. `top1` is what the
    authors claim, None the card's; `licence` unknown is the card's `weights_licence`. `reproduced` says who measured
    what when: "Ada, 2026-05-01, 81.3".
    """

    source: str
    sha256: str = "unknown"
    bytes: int | None = None
    mirrors: tuple[str, ...] = ()
    layout: str = "authors"
    data: str = "ImageNet-1K"
    img_size: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop: float = 0.875
    top1: float | None = None
    licence: str = "unknown"
    reproduced: str = ""


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
