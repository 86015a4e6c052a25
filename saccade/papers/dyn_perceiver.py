"""Dynamic Perceiver: a latent code that classifies beside a convolutional network, with an exit on its way.

Two branches meet before the blocks of every stage. The latent code z (L, C) gives to the map x and reads it,
    x += Attend(x, z),   z += Attend(z, cells(x + conv(x))),   z = Transformer(z),
cells the means of 7 x 7 parts of the map. Between stages half the latents go, at twice the width. Images whose class
is certain leave at the first of four exits that is sure enough: (1) z at the third stage, (2) z at the fourth,
(3) the last map, (4) both together. Exits 2 and 4 also read the scores of an earlier exit.

Han, Han, Liu, Wang, Pan, Pu, Deng, Feng, Song, Huang, "Dynamic Perceiver for Efficient Visual Recognition", 2023,
section 3. Budgets: `parts.early_exit`.

Any picture: cells adapt to the map. `DynamicPerceiver` takes any pyramid of four stages. Quirk: map queries (x) and
latent keys meet in an eighth of the width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.evaluation import evaluation
from saccade.core.features import Backbone
from saccade.core.keymap import KeyMap, Rule, pointwise, within
from saccade.ops.pooling import adaptive_mean
from saccade.parts.convolution import depthwise
from saccade.parts.early_exit import confidence
from saccade.parts.latent import LATENT_NAMES, LatentLayer
from saccade.parts.mobilenet_v3 import LARGE, NANO, MobileNetV3, Row, block_names
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid, undecayed
from saccade.parts.regnet import regnet_names, regnet_pyramid
from saccade.parts.resnet import BLOCK_NAMES, BasicBlock, Bottleneck, resnet_pyramid

_WIDTHS = {"": 1.0, "_0x5": 0.5, "_0x75": 0.75, "_1x25": 1.25, "_1x5": 1.5, "_2x0": 2.0}
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": dict(depths=(2, 2, 2, 2), basic=True),
    "resnet34": dict(depths=(3, 4, 6, 3), basic=True),
    **{f"resnet50{name}": dict(depths=(3, 4, 6, 3), dim=dim)
       for name, dim in {"": 64, "_0375": 24, "_050": 32, "_0625": 40, "_075": 48}.items()},
}
_REGNETS: dict[str, dict[str, Any]] = {
    "reg400m": dict(dims=(48, 104, 208, 440), depths=(1, 3, 6, 6), group=8),
    "reg800m": dict(dims=(64, 144, 320, 784), depths=(1, 3, 8, 2), group=16),
    "reg1x6g": dict(dims=(48, 120, 336, 888), depths=(2, 6, 17, 2), group=24),
    "reg3x2g": dict(dims=(72, 216, 576, 1512), depths=(2, 5, 13, 1), group=24),
}
_LATENTS = {"reg400m": (32, 64, 128, 256, 512), "reg800m": (32, 64, 128, 256, 512), "reg1x6g": (128, 256, 512),
            "reg3x2g": (128, 256, 512), "resnet18": (128, 256, 512), "resnet34": (128, 256, 512),
            "resnet50": (64, 128, 256, 512), "resnet50_0375": (64, 128, 256), "resnet50_050": (64, 128, 256),
            "resnet50_0625": (128, 160, 192, 256), "resnet50_075": (128, 256)}

CARD = Card(
    "Dynamic Perceiver for Efficient Visual Recognition",
    authors="Han, Han, Liu, Wang, Pan, Pu, Deng, Feng, Song, Huang",
    year=2023,
    systems=("dyn_perceiver",),
    arxiv="2306.11248",
    code="LeapLabTHU/Dynamic_Perceiver@0d2a629",
    licence="MIT",
    read="paper, code",
    keywords="early exit, anytime prediction, budgeted inference, latent code, cross-attention, MobileNetV3, dynamic",
    kinds=("backbone",),
    top1={"dyn_perceiver_mobilenet_v3_0x75_t128": 74.6, "dyn_perceiver_resnet50_0375_t128": 77.7,
          "dyn_perceiver_reg800m_t128": 79.9},
    aliases={f"mobilenetv3{width}_perceiver_t{latents}": f"dyn_perceiver_mobilenet_v3{width}_t{latents}"
             for width in _WIDTHS for latents in (128, 256, 512)}
    | {f"{host}_perceiver_t{latents}": f"dyn_perceiver_{host}_t{latents}"
       for host in _LATENTS for latents in _LATENTS[host]},
    weights={
        f"dyn_perceiver_{host}_t128": Weights(f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1", licence="MIT")
        for host, share in (("reg800m", "ca3c8a808d504fdfa2c8"), ("resnet50_0375", "844ac164a62246eb9ce8"),
                            ("mobilenet_v3_0x75", "a86c56e3076146ad8748"))
    },
    goldens=("dyn_perceiver_mobilenet_v3_0x75_t128",),
    tests=("tests/papers/test_dyn_perceiver.py",),
)
CELLS = 7


class Meeting(nn.Module):
    """Where the branches meet: a map (B, *grid, C) and latents (B, L, C') -> both, latents (B, L / 2, C).

    At the first stage, where `before` is None, latents have the map's width, none go, and the map gets nothing.
    """

    def __init__(
        self, rank: int, dim: int, before: int | None, latents: int, depth: int, heads: int, ratio: int
    ) -> None:
        super().__init__()
        self.size = (CELLS,) * rank
        self.write: LatentLayer | None = None
        if before is not None:
            self.halve = nn.Sequential(nn.LayerNorm(2 * latents), nn.Linear(2 * latents, latents))
            self.widen = nn.Sequential(nn.LayerNorm(before), nn.Linear(before, dim))
            self.write = LatentLayer(dim, dim, dim // 8)
        self.local = depthwise(rank, dim, 7)
        self.read = LatentLayer(dim, dim, keys=CELLS**rank)
        self.mix = nn.Sequential(*(LatentLayer(dim, heads=heads, ratio=ratio) for _ in range(depth)))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.write is not None:
            z = self.widen(self.halve(z.mT).mT)
            x = self.write(x.flatten(1, -2), z).view(x.shape)
        cells = adaptive_mean(x + self.local(x), self.size)
        return x, self.mix(self.read(z, cells.flatten(1, -2)))


class Exits(nn.Module):
    """The four classifiers, and what scores of one give to a later one."""

    def __init__(self, middle: int, dim: int, last: int, hidden: int | None, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(middle, classes)
        self.share1, self.share2 = (nn.Sequential(nn.Linear(classes, dim), BatchNorm(dim), nn.ReLU()) for _ in range(2))
        self.second = nn.Linear(2 * dim, classes)
        self.third = nn.Sequential(*_layers(last, hidden, classes))
        self.fourth = nn.Sequential(BatchNorm(last + 2 * dim), *_layers(last + 2 * dim, hidden, classes))


def _layers(dim: int, hidden: int | None, classes: int) -> list[nn.Module]:
    if hidden is None:
        return [nn.Linear(dim, classes)]
    return [nn.Linear(dim, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, classes)]


class DynamicPerceiver(Backbone):
    """A pyramid of four stages with a latent branch of `latents` codes, `depths` layers a stage, and four exits.

    The last two exits have a layer of `hidden` channels where it is given.

    `forward` gives the scores of the last exit, `exits` those of all, `early` each image's at its own.
    """

    undecayed = ("latent",)

    def __init__(
        self, host: Pyramid, latents: int = 128, depths: Sequence[int] = (3, 3, 9, 9),
        heads: Sequence[int] = (1, 2, 4, 8), ratio: int = 4, hidden: int | None = None, num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
    ) -> None:
        super().__init__()
        if len(host.stages) != 4:
            raise SaccadeError(f"dyn_perceiver: {type(host).__name__} has {len(host.stages)} stages; choose one of 4")
        if latents % 8:
            raise SaccadeError(f"dyn_perceiver: latents={latents}: half go three times; choose a multiple of 8")
        rank = 2 if isinstance(img_size, int) else len(img_size)
        self.stem, self.norm = host.stem, host.norm
        self.stages: Any = host.stages
        self.feature_info, self.default_out_indices = host.feature_info, host.default_out_indices
        dims = meeting_widths(host, rank)
        self.latent = nn.Parameter(nn.init.trunc_normal_(torch.empty(latents, dims[0]), std=0.02))
        self.meetings: Any = nn.ModuleList(
            Meeting(rank, dim, dims[stage - 1] if stage else None, latents >> stage, depths[stage], heads[stage], ratio)
            for stage, dim in enumerate(dims))
        self._widths = (dims[2], dims[3], host.num_features, hidden)
        self.last = LatentLayer(host.num_features, dims[3], host.num_features // 8)
        self.num_features = host.num_features + dims[3]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Four new exits of `num_classes` (0: none, and `forward` gives what the last would read)."""
        if global_pool not in (None, "avg"):
            raise SaccadeError(f"global_pool={global_pool!r}: the exits of dyn_perceiver read means; leave it at avg")
        self.num_classes = num_classes
        self.head: Any = Exits(*self._widths, num_classes) if num_classes else nn.Identity()
        self.removed = () if num_classes else ("head",)

    def meet(self, stage: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The map at the start of a stage, and the latents after it."""
        x, z = self.meetings[stage](self.stages[stage].downsample(x), z)
        return x, z

    def blocks(self, stage: int, x: Tensor) -> Tensor:
        """The map at the end of a stage, from where the branches met."""
        out: Tensor = self.stages[stage].norm(self.stages[stage].blocks(x))
        return out

    def first(self, image: Tensor) -> tuple[Tensor, ...]:
        """Map and latents of the third stage, and the scores that these latents have."""
        x, z = self.stem(image), self.latent.repeat(image.shape[0], 1, 1)
        x, z = self.meet(0, x, z)
        for stage in (1, 2):
            x, z = self.meet(stage, self.blocks(stage - 1, x), z)
        return (x, z, self.head.first(z.mean(1))) if self.num_classes else (x, z)

    def second(self, x: Tensor, z: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
        """The same of the fourth stage."""
        x, z = self.meet(3, self.blocks(2, x), z)
        if not scores:
            return x, z
        return x, z, self.head.second(torch.cat([z.mean(1), self.head.share1(scores[-1])], 1))

    def third(self, x: Tensor, z: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
        """The last map, the latents, the scores of exit 2, those of the map."""
        x = self.norm(self.blocks(3, x))
        return (x, z, *scores, self.head.third(x.flatten(1, -2).mean(1))) if scores else (x, z)

    def fused(self, x: Tensor, z: Tensor, *scores: Tensor) -> Tensor:
        """What the last exit reads, (B, features); `scores` are those of exits 2 and 3."""
        parts = [self.last(x.flatten(1, -2), z).mean(1), z.mean(1)]
        return torch.cat(parts + ([self.head.share2(scores[0])] if scores else []), 1)

    def fourth(self, *state: Tensor) -> tuple[Tensor, ...]:
        return (self.head.fourth(self.fused(*state)),)

    def steps(self) -> tuple[Callable[..., tuple[Tensor, ...]], ...]:
        """From what one exit leaves to the next, the scores last: what each computes is (B, ...), so images can go."""
        return self.first, self.second, self.third, self.fourth

    def exits(self, image: Tensor) -> list[Tensor]:
        """The scores (B, classes) of all four exits, in order."""
        state: tuple[Tensor, ...] = (image,)
        scores = []
        for step in self.steps():
            state = step(*state)
            scores.append(state[-1])
        return scores

    @torch.no_grad()
    def early(self, image: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Scores (B, classes) and exit (B,) of each image: the first whose confidence reaches its threshold.

        The last exit takes all that are left. What an image leaves is not computed for it.
        """
        if len(thresholds) != 4:
            raise SaccadeError(f"dyn_perceiver: {len(thresholds)} thresholds; give one for each of the 4 exits")
        left = torch.arange(len(image), device=image.device)
        chosen, found = torch.full_like(left, 3), image.new_zeros(len(image), self.num_classes)
        state: tuple[Tensor, ...] = (image,)
        for number, step in enumerate(self.steps()):
            state = step(*state)
            sure = confidence(state[-1]) >= (thresholds[number] if number < 3 else 0)
            found[left[sure]], chosen[left[sure]] = state[-1][sure].to(found.dtype), number
            left, state = left[~sure], tuple(part[~sure] for part in state)
            if not len(left):
                break
        return found, chosen

    def features(self, image: Tensor) -> list[Tensor]:
        x, z = self.stem(image), self.latent.repeat(image.shape[0], 1, 1)
        maps = []
        for stage in range(4):
            x, z = self.meet(stage, x, z)
            x = self.blocks(stage, x)
            maps.append(x.movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """What the last exit reads: (B, features)."""
        return self.fused(*self.third(*self.second(*self.first(image))))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head.fourth(features) if self.num_classes else features

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes), of the last exit."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        return undecayed(self)


def meeting_widths(host: Pyramid, rank: int) -> list[int]:
    """The channels of a host's map at the start of each stage, read off a small zero image."""
    found: list[int] = []
    stages: Any = host.stages
    handles = [stage.downsample.register_forward_hook(lambda *call: found.append(call[2].shape[-1]))
               for stage in stages]
    try:
        with evaluation(host), torch.no_grad():  # else batch norms would count the zeros
            host(torch.zeros(1, host.in_chans, *(64,) * rank))
    finally:
        for handle in handles:
            handle.remove()
    return found


def exit_loss(scores: Sequence[Tensor], label: Tensor, alpha: float = 0.5) -> Tensor:
    """The authors' loss of four exits: CE weighed (0.5, 0.5, 1, 1) + alpha sum of KL(last || exit), the last as given.

    `label` (B,) numbers of classes, or (B, classes) shares.
    """
    own = [weight * F.cross_entropy(one, label) for weight, one in zip((0.5, 0.5, 1.0, 1.0), scores, strict=True)]
    target = scores[-1].detach().softmax(1)
    taught = [F.kl_div(one.log_softmax(1), target, reduction="batchmean") for one in scores[:-1]]
    return torch.stack(own).sum() + alpha * torch.stack(taught).sum()


SIZES: dict[str, dict[str, Any]] = {
    f"dyn_perceiver_mobilenet_v3{name}_t{latents}": dict(width=width, latents=latents)
    for name, width in _WIDTHS.items() for latents in (128, 256, 512)
} | {
    f"dyn_perceiver_{host}_t{latents}": dict(shape, latents=latents, builder="dyn_perceiver_resnet")
    for host, shape in _RESNETS.items() for latents in _LATENTS[host]
} | {
    f"dyn_perceiver_{host}_t{latents}": dict(shape, latents=latents, builder="dyn_perceiver_regnet")
    for host, shape in _REGNETS.items() for latents in _LATENTS[host]
} | {"dyn_perceiver_nano": dict(rows=NANO, latents=16, depths=(1, 1, 2, 1), stem_stride=1, hidden=64, img_size=32)}


def dyn_perceiver(
    latents: int, width: float = 1.0, depths: Sequence[int] = (3, 3, 9, 9), ratio: int = 4, hidden: int | None = None,
    rows: Sequence[Sequence[Row]] = LARGE, stem_stride: int = 2, num_classes: int = 1000,
    img_size: int | Sequence[int] = 224, in_chans: int = 3, drop_path_rate: float = 0.0, mixer: Any = None,
) -> DynamicPerceiver:
    """A Dynamic Perceiver on MobileNetV3 of a width."""
    host = MobileNetV3(rows, width=width, stem_stride=stem_stride, img_size=img_size, in_chans=in_chans,
                       drop_path_rate=drop_path_rate, replace=mixer)
    hidden = int(1280 * width) if hidden is None else hidden
    return DynamicPerceiver(host, latents, depths, ratio=ratio, hidden=hidden, num_classes=num_classes,
                            img_size=img_size)


def dyn_perceiver_resnet(
    latents: int, depths: Sequence[int], basic: bool = False, dim: int = 64, layers: Sequence[int] = (3, 3, 9, 9),
    ratio: int = 4, num_classes: int = 1000, img_size: int | Sequence[int] = 224, in_chans: int = 3,
    drop_path_rate: float = 0.0, mixer: Any = None,
) -> DynamicPerceiver:
    """A Dynamic Perceiver on a ResNet of `dim` channels at first, whose latent branch has `layers` a stage."""
    bases = [dim * 2**stage for stage in range(4)]
    options: dict[str, Any] = dict(widths=bases, stem_dim=dim, img_size=img_size, in_chans=in_chans, replace=mixer,
                                   drop_path_rate=drop_path_rate)
    if basic:
        host = resnet_pyramid(bases, depths, block=BasicBlock, reduction=None, **options)
    else:
        host = resnet_pyramid([4 * base for base in bases], depths, block=Bottleneck, **options)
    return DynamicPerceiver(host, latents, layers, ratio=ratio, num_classes=num_classes, img_size=img_size)


def dyn_perceiver_regnet(
    latents: int, dims: Sequence[int], depths: Sequence[int], group: int, layers: Sequence[int] = (3, 3, 9, 6),
    ratio: int = 4, num_classes: int = 1000, img_size: int | Sequence[int] = 224, in_chans: int = 3,
    drop_path_rate: float = 0.0, mixer: Any = None,
) -> DynamicPerceiver:
    """A Dynamic Perceiver on a RegNetY, whose latent branch has `layers` a stage."""
    host = regnet_pyramid(dims, depths, group, img_size=img_size, in_chans=in_chans, drop_path_rate=drop_path_rate,
                          replace=mixer)
    return DynamicPerceiver(host, latents, layers, ratio=ratio, num_classes=num_classes, img_size=img_size)


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """The layers of the latent branch that a golden was recorded with."""
    args = golden["source"]["args"]
    host = golden["source"]["object"]
    factors = args.get("depth_factor", (1, 1, 1, 3 if "resnet" in host else 1))
    return dict({"depths" if "mobilenet" in host.lower() else "layers": tuple(
        depth * factor for depth, factor in zip((3, 3, 9, 3), factors, strict=True))},
                ratio=args.get("SA_widening_factor", 1))


def _mobilenet_names() -> list[Rule]:
    """The authors cut MobileNetV3 where the branches meet, one block after each of our stages begins."""
    places = [f"cnn_stem\\.{number}" for number in range(3)]
    places += [f"cnn_body_stage{stage}\\.{number}" for stage, count in enumerate((2, 3, 6, 3), 1)
               for number in range(count)]
    ours = ["stem.3."] + [f"stages.{stage}." + (f"blocks.{index - 1}." if index else "downsample.")
                          for stage, group in enumerate(LARGE[1:]) for index in range(len(group))]
    rows = [row for group in LARGE for row in group]
    rules: list[Rule] = [(r"cnn_stem\.0\.0\.(.*)", r"stem.0.\1"), (r"cnn_stem\.0\.1\.(.*)", r"stem.1.\1"),
                         (rf"{places[-1]}\.0\.(.*)", r"norm.0.\1", pointwise),
                         (rf"{places[-1]}\.1\.(.*)", r"norm.1.\1")]
    for number, (row, theirs, name) in enumerate(zip(rows, places[1:-1], ours, strict=True)):
        rules += block_names(row, number > 0, rf"{theirs}\.", name, "local" if row.stride == 2 else "mixer")
    return rules


def AUTHORS(name: str) -> KeyMap:
    """The authors' names of the host of a model, and of the latent branch."""
    rules: list[Rule]
    if "resnet" in name:
        rules = [(r"cnn_stem\.(.*)", r"stem.\1"), (r"classifier_cnn\.(weight|bias)", r"head.third.0.\1")]
        for stage in range(4):
            rules += within(BLOCK_NAMES, rf"cnn_body_stage{stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1.")
    elif "_reg" in name:
        rules = [*regnet_names(trunk="cnn_body", stem="cnn_stem"), (r"classifier_cnn\.(.*)", r"head.third.0.\1")]
    else:
        rules = _mobilenet_names()
    for stage in range(4):
        meeting = f"meetings.{stage}."
        rules.append((rf"dwc{stage + 1}_x2z\.(.*)", rf"{meeting}local.\1"))
        for theirs, name in ((rf"cross_att{stage + 1}_x2z\.", "read"), (rf"cross_att{stage + 1}_z2x\.", "write"),
                             (rf"self_att{stage + 1}\.(\d+)\.", r"mix.\1")):
            rules += within(LATENT_NAMES, theirs, f"{meeting}{name}.")
        rules += [(rf"token_mixer\.{stage}\.(.*)", rf"meetings.{stage + 1}.halve.\1"),
                  (rf"token_expander\.{stage}\.(.*)", rf"meetings.{stage + 1}.widen.\1")]
    rules += within(LATENT_NAMES, r"last_cross_att_z2x\.", "last.")
    heads = {"early_classifier3": "first", "isc3": "share1", "classifier_att": "second", "isc4": "share2",
             "classifier_cnn": "third", "classifier_merge": "fourth"}
    return (*rules, *((rf"{theirs}\.(.*)", rf"head.{name}.\1") for theirs, name in heads.items()))


TAPS = {"y_early3": "head.first", "y_att": "head.second", "y_cnn": "head.third", "y_merge": "head.fourth",
        **{f"sa{number + 1}": f"meetings.{number}.mix" for number in range(4)}}
