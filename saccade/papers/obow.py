"""OBoW: predict which visual words are in a picture, in words that are made as training goes.

A teacher, the moving average of the student, describes a picture as a bag of visual words: each place of its map is
assigned softly to the nearest of K words, and the picture is what its places have in common,
    code_k(u) = softmax_k(-|t(u) - w_k|^2 / (delta m)),  m the running mean of the least distance,
    bag = max over places u of code(u), normalised to the sum 1.
The student sees other, smaller crops, and predicts the bag from the mean of its last map f, by weights that a small
network G makes of the words, since the words change: softmax(kappa f . G(w_k) / |G(w_k)|). The vocabulary is a queue:
each step one local feature of each picture, averaged over 3x3 places, takes the place of the oldest words.

Gidaris, Bursuc, Puy, Komodakis, Cord, Pérez, "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised
Learning", 2021, section 3.

Words of the last two maps of a pyramid. The outermost places of a map are left out where three or more remain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, Rule, within
from saccade.parts.masking import maps_of, pyramid_of
from saccade.parts.resnet import BLOCK_NAMES

CARD = Card(
    "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning",
    authors="Gidaris, Bursuc, Puy, Komodakis, Cord, Pérez",
    year=2021,
    systems=("obow",),
    arxiv="2012.11552",
    code="valeoai/obow@3758504",
    licence="Apache-2.0",
    read="paper, code",
    keywords="self-supervised learning, bag of visual words, teacher and student, online vocabulary, multi-crop",
    kinds=("pretraining",),
    methods={"obow": "OBoW"},
    goldens=("obow_resnet18", "op_obow_extractor", "op_obow_predictor"),
    tests=("tests/papers/test_obow.py",),
)


class Vocabulary(nn.Module):
    """Visual words, and the bag (B, words) of a map (B, C, H, W); in training the words are renewed from the map.

    `sharpness` is 1 / delta; `pool` over places is "max" or "avg".
    """

    words: Tensor
    oldest: Tensor
    least: Tensor

    def __init__(self, words: int, dim: int, sharpness: float = 15.0, pool: str = "max") -> None:
        super().__init__()
        self.sharpness, self.pool = sharpness, pool
        self.register_buffer("words", torch.randn(words, dim).relu())
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.register_buffer("least", torch.tensor(0.5))  # the running mean of the distance to the nearest word

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = without_border(x)
        distance = self.distances(x)
        if self.training:
            self.least.lerp_(distance.amin(1).mean(), 0.01)
            self._renew(x)
        return self.bag(self.codes(distance))

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances (B, words, H, W) of each place to each word."""
        products = torch.einsum("bchw,kc->bkhw", x, self.words)
        return x.square().sum(1, keepdim=True) + self.words.square().sum(1)[:, None, None] - 2 * products

    def codes(self, distance: Tensor) -> Tensor:
        """Soft assignments (B, words, H, W) of each place to the words."""
        return (-self.sharpness / self.least * distance).softmax(1)

    def bag(self, codes: Tensor) -> Tensor:
        """What the places have in common, of sum 1."""
        return F.normalize(codes.amax((2, 3)) if self.pool == "max" else codes.mean((2, 3)), p=1, dim=1)

    def _renew(self, x: Tensor) -> None:
        side = min(3, *x.shape[2:])
        places = F.avg_pool2d(x, side, stride=1).flatten(2)
        choice = torch.randint(places.shape[2], (len(x),), device=x.device)
        fresh = places[torch.arange(len(x), device=x.device), :, choice][:len(self.words)]
        row = (self.oldest + torch.arange(len(fresh), device=x.device)) % len(self.words)
        self.words[row] = fresh.to(self.words.dtype)
        self.oldest.copy_((self.oldest + len(fresh)) % len(self.words))


def without_border(x: Tensor) -> Tensor:
    """The map (B, C, H, W) without its outermost places, along axes of three and more."""
    height, width = (int(side > 2) for side in x.shape[2:])
    return x[:, :, height:x.shape[2] - height, width:x.shape[3] - width]


class Predictor(nn.Module):
    """Features (B, C) and words [(K, C_i), ...] -> log chances before softmax [(B, K), ...], of scale kappa."""

    kappa: Tensor

    def __init__(self, dim: int, word_dims: Sequence[int], hidden: int, kappa: float = 8.0) -> None:
        super().__init__()
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Linear(word_dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                          nn.Linear(hidden, dim)) for word_dim in word_dims)
        self.register_buffer("kappa", torch.full((len(word_dims),), kappa))

    def forward(self, features: Tensor, words: Sequence[Tensor]) -> list[Tensor]:
        return [kappa * features @ F.normalize(generator(F.normalize(words_of, dim=1)), dim=1).mT
                for kappa, generator, words_of in zip(self.kappa, self.generators, words, strict=True)]


class OBoW(nn.Module):
    """Pictures (B, 1 + crops, C, H, W), the teacher's view and the student's -> {"loss", "perplexity"}.

    `model` is a pyramid, ours or timm's. `perplexity` counts the words in use in a batch (1: all pictures alike). The
    teacher follows the student with momentum `momentum`, which rises to 1 along a cosine of the training's course.
    """

    def __init__(
        self, model: nn.Module, words: int = 8192, crops: int = 2, sharpness: float = 15.0, kappa: float = 8.0,
        momentum: float = 0.99, pool: str = "max",
    ) -> None:
        super().__init__()
        if words < 2 or crops < 1 or pool not in ("max", "avg"):
            raise SaccadeError(f"obow: words={words}, crops={crops}, pool={pool!r}; give 2 or more words, 1 or more "
                               'crops, and "max" or "avg"')
        dims, _ = pyramid_of(model, "obow")
        self.model, self.views, self.momentum = model, 1 + crops, momentum
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.vocabularies = nn.ModuleList(Vocabulary(words, dim, sharpness, pool) for dim in dims[-2:])
        self.predictor = Predictor(dims[-1], dims[-2:], 2 * dims[-1], kappa)

    def feature(self, image: Tensor) -> Tensor:
        """What the student says of a crop: the mean (B, C) of its last map."""
        return maps_of(self.model, image)[-1].mean((2, 3))

    def bags(self, image: Tensor) -> list[Tensor]:
        """The teacher's bags of words (B, K) of each of the two maps."""
        with torch.no_grad():
            maps = maps_of(self.teacher, image)[-2:]
        return [vocabulary(x) for vocabulary, x in zip(self.vocabularies, maps, strict=True)]

    def predictions(self, features: Tensor) -> list[Tensor]:
        return self.predictor(features, [vocabulary.get_buffer("words").clone() for vocabulary in self.vocabularies])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.ndim != 5 or images.shape[1] != self.views:
            raise SaccadeError(f"obow: pictures of the shape {tuple(images.shape)}; give (B, {self.views}, C, H, W), "
                               "the teacher's view first")
        crops = images[:, 1:].flatten(0, 1)
        guesses = self.predictions(self.feature(crops))  # with the words of before this step
        bags = self.bags(images[:, 0])
        losses = [F.kl_div(guess.log_softmax(1), bag.repeat_interleave(self.views - 1, 0), reduction="batchmean")
                  for guess, bag in zip(guesses, bags, strict=True)]
        use = F.normalize(bags[-1].sum(0), p=1, dim=0)
        return {"loss": torch.stack(losses).mean(), "perplexity": (-(use * (use + 1e-5).log()).sum()).exp()}

    @torch.no_grad()
    def after_step(self, share: float) -> None:
        """The teacher follows the student; `share` of the training is done."""
        pull = (1 - self.momentum) * 0.5 * (1 + math.cos(math.pi * share))
        for theirs, ours in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            theirs.lerp_(ours, pull)


def _resnet_names() -> list[Rule]:
    rules: list[Rule] = [(r"_feature_blocks\.0\.Conv\.(.*)", r"stem.0.\1"),
                         (r"_feature_blocks\.0\.bn\.(.*)", r"stem.1.\1")]
    for stage in range(4):
        rules += within(BLOCK_NAMES, rf"_feature_blocks\.{stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1.")
    return rules


AUTHORS: KeyMap = (
    *within(_resnet_names(), r"feature_extractor\.", "model."),
    *within(_resnet_names(), r"feature_extractor_teacher\.", "teacher."),
    (r"bow_predictor\.scale", "predictor.kappa"),
    *((rf"bow_predictor\.layers_w\.(\d+)\.b\d+_{theirs}\.(.*)", rf"predictor.generators.\1.{ours}.\2")
      for theirs, ours in (("fc", 0), ("bn", 1), ("last_layer", 3))),
    (r"bow_extractor\.bow_extractor\.(\d+)\._embedding", r"vocabularies.\1.words"),
    (r"bow_extractor\.bow_extractor\.(\d+)\._embedding_ptr", r"vocabularies.\1.oldest", torch.squeeze),
    (r"bow_extractor\.bow_extractor\.(\d+)\._min_distance_mean", r"vocabularies.\1.least", torch.squeeze),
    Dropped(r"bow_extractor\.bow_extractor\.\d+\._track_num_batches|_alpha|_iteration|linear_classifier\..*",
            "counters, and a monitor"),
)
