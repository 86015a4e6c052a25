"""SiT (self-slimmed vision transformer): slim the tokens to a few learned mixtures of them.

After some blocks a slimming module makes N tokens to M, every one a weighted sum of all,
    X' = softmax_over_tokens(s mlp(norm(X)))^T X,   mlp: C -> C/2 -> M, s one learned number,
which is softer than dropping and can be undone: after every block a reverse module (an MLP across tokens M -> N, then
one across channels) grows the N tokens back, so that a slimmed student can be told, token by token, what the whole
teacher saw there (feature recalibration distillation). The reverse modules serve training alone.

Zong, Li, Song, Wang, Qiao, Leng, Liu, "Self-slimmed Vision Transformer", 2022, sections 3.2-3.3.

The tokens' numbers belong to the native grid: any picture is slimmed to as many. The class token is left out. The
published models are LV-ViTs (Jiang et al., "All Tokens Matter", 2021): a stem of four 3x3 convolutions of stride 2,
residual branches divided by 2. Settings of the larger ones are from memory of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap, within
from saccade.core.swap import Handle
from saccade.parts.attention import Attention
from saccade.parts.block import Norm, residual_tail
from saccade.parts.convolution import conv_norm
from saccade.parts.host import HostBlock, check_rate, chosen_layers, native_grid, open_blocks
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.plain import DEIT, Plain, TokenBlock
from saccade.parts.stem import ConvStem

CARD = Card(
    "Self-slimmed Vision Transformer",
    authors="Zong, Li, Song, Wang, Qiao, Leng, Liu",
    year=2022,
    systems=("self_slimmed",),
    arxiv="2111.12624",
    code="Sense-X/SiT@f577808",
    licence="Apache-2.0",
    read="paper, code",
    keywords="token slimming, soft token aggregation, reverse slimming, feature recalibration distillation, LV-ViT",
    kinds=("token reduction", "backbone"),
    methods={"self_slimmed": "self_slimmed"},
    top1={"sit_lvvit_tiny": 80.1, "sit_lvvit_xsmall": 81.1, "sit_lvvit_small": 83.2, "sit_lvvit_medium": 84.3,
          "sit_lvvit_large": 85.6},
    weights={
        f"sit_lvvit_{size}": Weights(f"https://drive.google.com/file/d/{file}/view?usp=sharing", top1=top1,
                                     licence="Apache-2.0")
        for size, file, top1 in (("tiny", "1hUGQU8Z4WxdgU7yePxZSOsp5vG_wSkja", 80.1),
                                 ("xsmall", "10xKbVwI_l4tQaJJmUSorGhl_S2w0iAJL", 81.2),
                                 ("small", "1nLurrn8t_KzdXw0eGpSttad5vYa_wMIk", 83.1),
                                 ("medium", "1Xt8w9qZ2MMFOfohFwCn6mX0hqW6J0fnL", 84.2),
                                 ("large", "1N-RMArXD_GsUgGKpLePhJTOpTZImas2G", 85.6))
    },
    goldens=("sit_lvvit_tiny", "op_sit_token_slimming", "op_sit_reverse_tsm"),
    tests=("tests/papers/test_self_slimmed.py",),
)


class TokenSlimming(nn.Module):
    """X' = softmax_over_tokens(s mlp(norm(X)))^T X: (B, N, C) -> (B, M, C)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, count))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.mlp(self.norm(x))).softmax(1).mT @ x


class ReverseSlimming(nn.Module):
    """Grow M tokens back to N: y = mlp_tokens(norm(x)); y + mlp(norm(y)). (B, M, C) -> (B, N, C)."""

    def __init__(self, dim: int, count: int, whole: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(count, 4 * whole), nn.GELU(), nn.Linear(4 * whole, whole))
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.norm1(x).mT).mT
        return x + self.mlp(self.norm2(x))


class SlimmingBlock(HostBlock):
    """A block that, where it has a slimming module, gives its mixtures of the grid tokens on."""

    def __init__(self, slim: TokenSlimming | None, **host: Any) -> None:
        super().__init__(**host)
        self.slim: Any = slim

    def drops(self) -> bool:
        return self.slim is not None

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        tokens = super().forward(tokens)
        if self.slim is None:
            return tokens
        slimmed = self.slim(tokens[:, self.prefix:])
        always = self.kept.numbers[:, :self.prefix]
        self.kept.numbers = torch.cat([always, always.new_full((1, slimmed.shape[1]), -1)], 1)
        return torch.cat([tokens[:, :self.prefix], slimmed], 1)


def self_slimmed(model: nn.Module, layers: Sequence[int] | None = None, keep: float = 0.5) -> Handle:
    """Slim after the blocks `layers`, each time to the share `keep` of the tokens; its weights are to be trained.

    By default after 3, 6 and 9 of 12 blocks, at the same shares of another depth.
    """
    check_rate("self_slimmed", "keep", keep)
    chosen = sorted(chosen_layers(model, "self_slimmed", layers, (3, 6, 9)))
    counts = dict(zip(chosen, slimmed_counts(torch.Size(native_grid(model)).numel(), keep, len(chosen)), strict=True))

    def build(number: int, block: Any, **host: Any) -> nn.Module:
        dim = block.norm1.weight.shape[0]
        slim = TokenSlimming(dim, counts[number]) if number in counts else None
        return SlimmingBlock(slim, block=block, **host)

    return open_blocks(model, "self_slimmed", build)


def slimmed_counts(whole: int, keep: float, times: int) -> list[int]:
    """floor(N keep^i), at least one token, for i = 1, 2, ..."""
    return [max(int(whole * keep**number), 1) for number in range(1, times + 1)]


def recalibration_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean square by which recovered tokens (B, N, C) of several blocks miss the teacher's (section 3.3)."""
    missed = [F.mse_loss(ours, theirs.detach()) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(missed).mean()


class Factor(nn.Module):
    """x times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def divided_block(*args: Any, norm: Norm, drop_path: float, ratio: float, divisor: float) -> TokenBlock:
    """A block whose branches are divided by a number before they are added."""
    block = TokenBlock(*args, norm=norm, mlp=partial(Mlp, ratio=ratio))
    for tail in ("scale1", "scale2"):
        setattr(block, tail, nn.Sequential(Factor(1 / divisor), residual_tail(args[0].dim, None, drop_path)))
    return block


class SelfSlimmed(Plain):
    """An LV-ViT that is slimmed after the last block of every stage but the last, with the reverse modules of training.

    `recovered(image)` gives the class scores and, from the first slimming on, the tokens after every block grown back
    to the whole grid.
    """

    def __init__(
        self, dim: int, stages: Sequence[int], heads: int, *, keep: float, ratio: float, divisor: float,
        convs: int = 4, in_chans: int = 3, **common: Any,
    ) -> None:
        super().__init__(dim, sum(stages), heads, in_chans=in_chans, norm=nn.LayerNorm,
                         mixer=partial(Attention, qkv_bias=False),
                         block=partial(divided_block, ratio=ratio, divisor=divisor), **common)
        layers: list[nn.Module] = []
        widths = [in_chans, *[dim // 8] * (convs - 3), dim // 4, dim // 2, dim]
        for number, (before, after) in enumerate(pairwise(widths)):
            stride = 1 if 0 < number <= convs - 4 else 2
            layers += [*conv_norm(len(self.grid), before, after, stride=stride), Gelu()]
        self.stem = ConvStem(*layers[:-1])  # type: ignore[assignment]
        ends = list(accumulate(stages))
        whole = torch.Size(self.grid).numel()
        counts = slimmed_counts(whole, keep, len(stages) - 1)
        # How many tokens are left after each block, from the last of the first stage on.
        left = [counts[sum(number >= end - 1 for end in ends[:-1]) - 1] for number in range(ends[0] - 1, ends[-1])]
        self.reverse = nn.ModuleList(ReverseSlimming(dim, count, whole) for count in left)
        self_slimmed(self, [end - 1 for end in ends[:-1]], keep)

    def recovered(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens, grid = self.tokens(image)
        grown: list[Tensor] = []
        whole = len(self.blocks) - len(self.reverse)
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, self.prefix_count, grid)
            if number >= whole:
                grown.append(self.reverse[number - whole](tokens[:, self.prefix_count:]))
        return self.forward_head(self.norm(tokens)), grown


SIZES: dict[str, dict[str, Any]] = {
    f"sit_lvvit_{size}": dict(builder="sit_lvvit", dim=dim, stages=stages, heads=heads)
    for size, dim, stages, heads in (
        ("tiny", 320, (1, 1, 1, 11), 5), ("xsmall", 384, (1, 1, 1, 13), 6), ("small", 384, (9, 3, 2, 2), 6),
        ("medium", 512, (10, 4, 3, 3), 8), ("large", 768, (10, 4, 3, 7), 12),
    )
}
SIZES["sit_lvvit_large"] |= dict(convs=6, divisor=3.0, img_size=288)


def sit_lvvit(
    dim: int, stages: Sequence[int], heads: int, keep: float = 0.5, ratio: float = 3.0, divisor: float = 2.0,
    convs: int = 4, patch: int = 16, mixer: Any = None, **common: Any,
) -> SelfSlimmed:
    """A SiT of a size."""
    return SelfSlimmed(dim, stages, heads, keep=keep, ratio=ratio, divisor=divisor, convs=convs, patch=patch,
                       replace=mixer, **common)


SLIMMING: KeyMap = (
    (r"weight\.0\.(.*)", r"norm.\1"), (r"weight\.1\.(.*)", r"mlp.0.\1"), (r"weight\.3\.(.*)", r"mlp.2.\1"),
    (r"scale", "scale"),
)
REVERSE: KeyMap = (
    (r"mlp1\.fc1\.(.*)", r"tokens.0.\1"), (r"mlp1\.fc2\.(.*)", r"tokens.2.\1"), (r"mlp2\.(.*)", r"mlp.\1"),
    (r"(norm\d.*)", r"\1"),
)
STEM: KeyMap = tuple(
    (rf"patch_embed\.{theirs}{layer}\.(.*)", rf"stem.{3 * (layer - 1) + ours}.\1")
    for layer in range(1, 7) for theirs, ours in (("conv", 0), ("bn", 1))
)


def AUTHORS(name: str) -> KeyMap:
    """The authors' names: their slimming modules stand in a list, ours in the blocks before them.

    Their reverse modules have the numbers of the blocks, ours begin with the first that slims.
    """
    return authors_names(SIZES[name]["stages"])


def authors_names(stages: Sequence[int]) -> KeyMap:
    """The authors' names in a network of so many blocks a stage."""
    return (
        Dropped(r"aux_head\..*", "a head that the slimmed network never asks"),
        *(rule for number, end in enumerate(list(accumulate(stages))[:-1])
          for rule in within(SLIMMING, rf"tsm\.{number}\.", f"blocks.{end - 1}.slim.")),
        *(rule for number in range(sum(stages[1:]) + 1)
          for rule in within(REVERSE, rf"rtsm\.{number + stages[0] - 1}\.", f"reverse.{number}.")),
        *STEM, *DEIT,
    )


TAPS = {r"tokens(\d+)": r"blocks.\1"}
