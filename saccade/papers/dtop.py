"""DToP: tokens whose class is certain leave a plain segmenter early.

Heads cut a plain transformer into stages. Each scores the tokens that are left for every class,
    p_kj = softmax(c_k)[present] sigmoid(M_kj),   M = mean over heads of q k^T / sqrt(d),
queries q one a class, keys the tokens, in the last of a few decoder layers. Tokens with max_k p_kj > threshold are
decided and leave, but for the five most certain of each class, which stay as context. The masks of tokens that left are
those of the stage they left in; the class probabilities are the last head's.

Tang, Zhang, Liu, Liu, Chen, "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation", 2023,
section 3; heads: Zhang et al., "SegViT", 2022, section 3.2.

Any picture: the position table is resampled. Quirk kept: the class token only lends the position table its first row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within
from saccade.core.site import Site
from saccade.ops.attend import affinity, attend
from saccade.parts.attention import Attention
from saccade.parts.host import HostBlock, Kept, gathered, packed
from saccade.parts.plain import MMSEGMENTATION, Plain

CARD = Card(
    "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
    authors="Tang, Zhang, Liu, Liu, Chen",
    year=2023,
    systems=("dtop",),
    arxiv="2308.01045",
    code="zbwxp/Dynamic-Token-Pruning@2baefff",
    licence="BSD-2-Clause",
    read="paper, code",
    keywords="dynamic token pruning, early exit of tokens, semantic segmentation, attention-to-mask",
    kinds=("segmentation", "token reduction"),
    goldens=("dtop_segvit_tiny", "dtop_segvit_tiny_noprune"),
    tests=("tests/papers/test_dtop.py",),
)

CONTEXT = 5  # tokens of each class that stay, however certain


class MaskLayer(nn.Module):
    """q <- norm(q + f(q)), f attention among queries, attention to tokens, an MLP: also the logits of the second.

    The logits are the mean over heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.among = Attention(Site(dim, heads))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, queries: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """queries (B, K, C), x (B, N, C), bias (B, 1, 1, N), -inf at padding -> queries, logits (B, K, N)."""
        queries = self.norm1(queries + self.among(queries))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q(queries), self.k(x), self.v(x)))
        mixed = affinity(q, k, bias) @ v
        queries = self.norm2(queries + self.proj(mixed.transpose(1, 2).flatten(2)))
        queries = self.norm3(queries + self.fc2(F.relu(self.fc1(queries))))
        return queries, (q @ k.mT).mean(1) * q.shape[-1] ** -0.5


class MaskHead(nn.Module):
    """Tokens (B, N, C) -> masks (B, classes, N), whose sigmoid says where a class is, and (B, classes, 2): is it."""

    def __init__(self, in_dim: int, dim: int, classes: int, layers: int, heads: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(classes, dim))
        self.layers = nn.ModuleList(MaskLayer(dim, heads) for _ in range(layers))
        self.present = nn.Linear(dim, 2)

    def forward(self, tokens: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x, queries = self.norm(self.proj(tokens)), self.queries[None].repeat(len(tokens), 1, 1)
        for layer in self.layers:
            queries, masks = layer(queries, x, bias)
        return masks, self.present(queries)


class LiveBlock(HostBlock):
    """A block among the tokens that are left of each picture; what pads a picture is not computed."""

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        real = self.kept.numbers >= 0
        if bool(real.all()):
            return self.add_mlp(self.add_attention(tokens))
        packed, counts = tokens[real][None], real.sum(1).tolist()  # those of all pictures in a row
        numbers = self.kept.numbers[real].split(counts)
        pictures = zip(*(part.split(counts, 2) for part in self.queries_keys_values(packed)), numbers, strict=True)
        mixed = [attend(q, k, v, where=partial(_among, number)) for q, k, v, number in pictures]
        packed = self.add_mlp(self.add_mixed(packed, torch.cat(mixed, 2)))
        return torch.zeros_like(tokens).masked_scatter(real[..., None], packed)


def _among(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """`where` of the tokens of one picture."""
    return numbers[None], numbers[None]


class Stage(NamedTuple):
    """What a head saw: features (B, N, C), zero where a token has left; masks (B, K, N); classes (B, K, 2)."""

    features: Tensor
    masks: Tensor
    classes: Tensor

    @property
    def scores(self) -> Tensor:
        """(B, K, N) in (0, 1)."""
        return certainty(self.masks, self.classes)


def certainty(masks: Tensor, classes: Tensor) -> Tensor:
    """softmax(classes)[present] sigmoid(masks): masks (B, K, N), classes (B, K, 2) -> (B, K, N)."""
    return classes.softmax(-1)[..., :1] * masks.sigmoid()


class DToP(nn.Module):
    """image (B, C, H, W) -> class scores (B, K, H, W) in (0, 1); in training a dict with every head's masks, classes.

    `stages` are the blocks after which the heads stand, `thresholds` what a score must pass to be decided there.
    """

    def __init__(
        self, trunk: Plain, stages: Sequence[int], thresholds: Sequence[float], classes: int, dim: int, layers: int,
        heads: int,
    ) -> None:
        super().__init__()
        if len(stages) != len(thresholds) or list(stages) != sorted(set(stages)):
            raise SaccadeError(f"dtop: stages={tuple(stages)} and thresholds={tuple(thresholds)}; give growing numbers "
                               "of blocks and one threshold each")
        self.kept, self.trunk, self.stages, self.thresholds = Kept(), trunk, tuple(stages), tuple(thresholds)
        trunk.norm = nn.Identity()
        trunk.blocks = nn.ModuleList(LiveBlock(block, 0, self.kept, not number)
                                     for number, block in enumerate(trunk.blocks[:stages[-1] + 1]))
        self.heads = nn.ModuleList(MaskHead(trunk.num_features, dim, classes, layers, heads) for _ in stages)

    def run(self, image: Tensor) -> tuple[list[Stage], tuple[int, ...]]:
        """Every head's view, the last one's being the result, and the grid of the tokens."""
        tokens, grid = self.trunk.tokens(image)
        tokens = tokens[:, self.trunk.prefix_count:]
        count, seen = tokens.shape[1], []
        self.kept.start(tokens)
        self.kept.numbers = self.kept.numbers.expand(len(tokens), -1)
        masks: Tensor | None = None
        for number, block in enumerate(self.trunk.blocks):
            tokens = block(tokens)
            if number not in self.stages:
                continue
            place = self.stages.index(number)
            found, classes = self.heads[place](tokens, self.kept.padding_bias(tokens))
            masks = found if masks is None else self._write(masks.mT, found.mT).mT
            nothing = tokens.new_zeros(len(tokens), count, tokens.shape[-1])
            seen.append(Stage(self._write(nothing, tokens), masks, classes))
            if self.thresholds[place] < 1:
                index, real = packed(self.undecided(certainty(found, classes), self.thresholds[place]))
                tokens = gathered(tokens, index)
                self.kept.choose(index, real=real)
        return seen, grid

    def undecided(self, scores: Tensor, threshold: float) -> Tensor:
        """Which tokens stay (B, N), by their scores (B, K, N): all below the threshold, the best five of each class."""
        real = self.kept.numbers >= 0
        score, kind = scores.detach().max(1)
        sure = (score > threshold) & real
        order = score.masked_fill(~sure, -torch.inf).argsort(dim=1, descending=True, stable=True)
        of_kind = F.one_hot(kind.gather(1, order), scores.shape[1])
        rank = of_kind.cumsum(1).mul(of_kind).sum(-1)  # from 1, among those of its class
        best = torch.zeros_like(sure).scatter(1, order, rank <= CONTEXT)
        return real & (~sure | best)

    def _write(self, whole: Tensor, tokens: Tensor) -> Tensor:
        """`whole` (B, N, C) with the tokens (B, M, C) that are left put in their places."""
        numbers = self.kept.numbers
        padded = F.pad(whole, (0, 0, 0, 1))  # a place for what pads a picture
        index = torch.where(numbers < 0, whole.shape[1], numbers)[..., None].expand(-1, -1, tokens.shape[-1])
        return padded.scatter(1, index, tokens.to(whole.dtype))[:, :-1]

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        seen, grid = self.run(image)
        scores = seen[-1].scores.unflatten(-1, grid)
        out = F.interpolate(scores, size=image.shape[2:], mode="bilinear", align_corners=False)
        if not self.training:
            return out
        return {"scores": out} | {f"{name}{place}": value for place, stage in enumerate(seen) for name, value in
                                  (("masks", stage.masks.unflatten(-1, grid)), ("classes", stage.classes))}


def segmentation_loss(outputs: dict[str, Tensor], labels: Tensor, ignore: int = 255) -> Tensor:
    """The loss of every head, added: cross-entropy of presence + 20 focal + dice of the masks of the classes present.

    `outputs` as DToP gives them in training, labels (B, H, W) of class numbers, `ignore` where there is none. Classes
    that are not there weigh 0.1 in the cross-entropy. (SegViT, section 3.3.)
    """
    heads = sum(name.startswith("masks") for name in outputs)
    return torch.stack([_head_loss(outputs[f"masks{head}"], outputs[f"classes{head}"], labels, ignore)
                        for head in range(heads)]).sum()


def _head_loss(masks: Tensor, classes: Tensor, labels: Tensor, ignore: int) -> Tensor:
    kinds = torch.arange(masks.shape[1], device=labels.device)[:, None, None]
    wanted = (labels[:, None] == kinds) & (labels[:, None] != ignore)
    there = wanted.flatten(2).any(-1)
    presence = F.cross_entropy(classes.flatten(0, 1), (~there).long().flatten(), classes.new_tensor([1.0, 0.1]))
    logits = F.interpolate(masks, size=labels.shape[1:], mode="bilinear", align_corners=False)[there].flatten(1)
    target, count = wanted[there].flatten(1).to(logits.dtype), there.sum().clamp(min=1)
    share = logits.sigmoid()
    missed = 1 - (share * target + (1 - share) * (1 - target))
    weight = (0.25 * target + 0.75 * (1 - target)) * missed**2
    focal = (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean(1).sum() / count
    dice = (1 - (2 * (share * target).sum(1) + 1) / (share.sum(1) + target.sum(1) + 1)).sum() / count
    return presence + 20 * focal + dice


_LARGE: dict[str, Any] = dict(dim=1024, depth=24, heads=16, stages=(7, 15, 23), thresholds=(0.95, 0.95, 1.0),
                              mask_heads=16)
SIZES: dict[str, dict[str, Any]] = {
    "dtop_segvit_base": dict(dim=768, depth=12, heads=12, stages=(5, 7, 11), thresholds=(0.9, 0.9, 1.0), img_size=512),
    "dtop_segvit_large": _LARGE | dict(mask_heads=8, img_size=640),
    "dtop_segvit_large_context": dict(_LARGE, img_size=480, num_classes=59),
    "dtop_segvit_large_stuff": dict(_LARGE, img_size=512, num_classes=171),
}


def dtop(
    dim: int,
    depth: int,
    heads: int,
    stages: Sequence[int],
    thresholds: Sequence[float],
    num_classes: int = 150,
    img_size: int | Sequence[int] = 512,
    head_dim: int | None = None,
    layers: int = 3,
    patch: int = 16,
    in_chans: int = 3,
    mask_heads: int = 6,
    drop_path_rate: float = 0.1,
) -> DToP:
    """A SegViT that prunes, with a head behind each of the blocks `stages`.

    A head has `head_dim` channels (half the trunk's unless given) and `mask_heads` heads of attention.
    """
    trunk = Plain(dim, depth, heads, patch=patch, num_classes=0, img_size=img_size, in_chans=in_chans,
                  drop_path_rate=drop_path_rate)
    return DToP(trunk, stages, thresholds, num_classes, head_dim or dim // 2, layers, mask_heads)


def authors(stages: int) -> KeyMap:
    """The authors' names, for so many heads: the last is called decode_head."""
    return (
        *within(MMSEGMENTATION, r"backbone\.", "trunk."),
        *(rule for theirs, ours in ((r"auxiliary_head\.(\d+)\.", r"heads.\1."),
                                    (r"decode_head()\.", rf"heads.{stages - 1}."))
          for rule in (
              (rf"{theirs}input_proj\.(.*)", rf"{ours}proj.\2"),
              (rf"{theirs}proj_norm\.(.*)", rf"{ours}norm.\2"),
              (rf"{theirs}decoder\.layers\.(\d+)\.multihead_attn\.(.*)", rf"{ours}layers.\2.\3"),
              (rf"{theirs}decoder\.layers\.(\d+)\.self_attn\.in_proj_(.*)", rf"{ours}layers.\2.among.qkv.\3"),
              (rf"{theirs}decoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", rf"{ours}layers.\2.among.proj.\3"),
              (rf"{theirs}decoder\.layers\.(\d+)\.norm(\d)\.(.*)", rf"{ours}layers.\2.norm\3.\4"),
              (rf"{theirs}decoder\.layers\.(\d+)\.linear(\d)\.(.*)", rf"{ours}layers.\2.fc\3.\4"),
              (rf"{theirs}q\.weight", rf"{ours}queries"),
              (rf"{theirs}class_embed\.(.*)", rf"{ours}present.\2"),
          )),
    )


AUTHORS: KeyMap = authors(3)
