"""DHVT: a plain transformer that learns from little data, by convolutions and by tokens that speak for heads.

Head h sums its own channels up in one token, made of what all N tokens hold of them (d channels a head),
    t_h = gelu(norm(P mean over the tokens of x[h])) + e_h,         P from d to C channels, normed in groups of d;
the heads' tokens join the sequence in self-attention, so that groups of channels meet, and what they learn is averaged
into the class token. The MLP holds a depthwise convolution and weighs the class token by what the map has become,
    y = norm(W_2 (z + gelu(norm(conv(z))))),  z = gelu(norm(W_1 x)),       class *= V_2 gelu(V_1 mean(y)),
and patches are embedded by 3x3 convolutions of stride 2 between two affine maps.

Lu, Xie, Liu, Zhang, "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
2022, section 3.

Any grid: convolutions pad with zeros, and tell where tokens stand; there is no position table. A gray image is taken as
three equal channels. Without prefix tokens the heads' tokens are keys alone.
Quirks kept: the weight of the class token has no sigmoid; the last norm of the MLP no activation.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, pointwise, within, without_first_axis
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.parts.attention import check_heads
from saccade.parts.block import Affine
from saccade.parts.convolution import conv_norm, depthwise
from saccade.parts.norm import BatchNorm
from saccade.parts.plain import Plain, TokenBlock
from saccade.parts.tokens import join, split

CARD = Card(
    "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
    authors="Lu, Xie, Liu, Zhang",
    year=2022,
    systems=("dhvt",),
    arxiv="2210.05958",
    code="ArieSeirack/DHVT@a86feda",
    licence="Apache-2.0",
    read="paper, code",
    keywords="head tokens, head-interacted multi-head self-attention, HI-MHSA, dynamic aggregation feed forward, DAFF, "
             "sequential overlapping patch embedding, small datasets",
    kinds=("backbone", "mixer"),
    mixers={"head_interaction": "HeadInteraction"},
    params={"dhvt_tiny_imagenet_patch16": 6.2e6, "dhvt_small_imagenet_patch16": 24.0e6,
            "dhvt_tiny_cifar_patch4": 6.0e6, "dhvt_small_cifar_patch4": 23.4e6,
            "dhvt_tiny_cifar_patch2": 5.8e6, "dhvt_small_cifar_patch2": 22.8e6},
    macs={"dhvt_tiny_imagenet_patch16": 1.4e9, "dhvt_small_imagenet_patch16": 5.1e9},
    top1={"dhvt_tiny_imagenet_patch16": 77.6, "dhvt_small_imagenet_patch16": 82.3},
    goldens=("dhvt_tiny_cifar_patch4", "dhvt_tiny_imagenet_patch16", "op_daff", "op_hi_mhsa"),
    tests=("tests/papers/test_dhvt.py",),
)


class HeadInteraction(nn.Module):
    """Self-attention among grid, prefix and one token a head, which is then averaged into the prefix tokens.

    (B, *grid, C), and with prefix tokens (B, P, C), to the same. (Lu et al., DHVT, 2022, section 3.4: HI-MHSA.)
    """

    ranks, prefix, weights = (1, 2, 3), True, True
    template = Template("q k^T / sqrt(d), also of a token a head", "softmax", "sum of v")
    undecayed = ("identity",)
    projections = ("qkv", "proj")

    def __init__(self, site: Site, qkv_bias: bool = True) -> None:
        super().__init__()
        width = check_heads(site)
        self.heads = site.heads
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)
        self.summary = nn.Linear(width, site.dim)
        self.norm = nn.LayerNorm(width)
        self.identity = nn.Parameter(torch.zeros(1, site.heads, site.dim))
        nn.init.trunc_normal_(self.identity, std=0.02)

    @overload
    def forward(self, x: Tensor, prefix: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        tokens = join(x, prefix)
        B, N, C = tokens.shape
        tokens = torch.cat([tokens, self.head_tokens(tokens)], 1)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, C // self.heads)).permute(2, 0, 3, 1, 4)

        def where() -> tuple[Tensor, Tensor]:
            numbers = numbered(N, self.heads, x.device)
            return numbers, numbers

        mixed = self.proj(attend(q, k, v, where=where).transpose(1, 2).flatten(2))
        rest, spoken = mixed.split_with_sizes([N, self.heads], 1)
        if prefix is None:
            return split(rest, x, None).contiguous()
        grid, first = split(rest, x, prefix)
        return grid, first + spoken.mean(1, keepdim=True)

    def head_tokens(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, C): what each head's channels are on average, projected and normed."""
        means = tokens.mean(1).unflatten(-1, (self.heads, -1))
        groups = self.summary(means).unflatten(-1, (self.heads, -1))
        return nn.functional.gelu(self.norm(groups)).flatten(2) + self.identity

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 4 T C^2 + 2 T^2 C with T tokens, those of the heads among them; C^2 to make these."""
        tokens = torch.Size(grid).numel() + prefix + site.heads
        return (4 * tokens + 1) * site.dim**2 + 2 * tokens**2 * site.dim

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


@table
def numbered(count: int, more: int, device: torch.device) -> Tensor:
    """(1, count + more) the numbers of `count` tokens, then -1 for `more` that stand nowhere."""
    return torch.cat([torch.arange(count, device=device), torch.full((more,), -1, device=device)])[None]


class DynamicAggregation(nn.Module):
    """An MLP with a depthwise convolution on the grid, and a weight for the prefix tokens made of its result.

    x (B, *grid, C) and prefix tokens (B, P, C) to the same. (Lu et al., DHVT, 2022, section 3.3: DAFF.)
    """

    def __init__(self, rank: int, dim: int, hidden: int, kernel: int = 3) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(dim, hidden), BatchNorm(hidden)
        self.local, self.norm2 = depthwise(rank, hidden, kernel), BatchNorm(hidden)
        self.fc2, self.norm3 = nn.Linear(hidden, dim), BatchNorm(dim)
        self.compress, self.excite = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        gelu = nn.functional.gelu
        hidden = gelu(self.norm1(self.fc1(x)))
        hidden = hidden + gelu(self.norm2(self.local(hidden)))
        x = self.norm3(self.fc2(hidden))
        weight = self.excite(gelu(self.compress(x.flatten(1, -2).mean(1, keepdim=True))))
        return x, prefix * weight


class HybridBlock(TokenBlock):
    """A block whose MLP, too, sees grid and prefix tokens apart."""

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        normed = self.norm1(tokens)
        tokens = tokens + self.scale1(join(*self.mixer(normed[:, count:].unflatten(1, grid), prefix=normed[:, :count])))
        normed = self.norm2(tokens)
        return tokens + self.scale2(join(*self.mlp(normed[:, count:].unflatten(1, grid), normed[:, :count])))


class PixelAffine(Affine):
    """x weight + bias on the channels of an image."""

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """Entries of another number of channels, repeated."""
        channels = len(self.weight)
        return value.repeat(-(-channels // len(value)))[:channels]


class Overlapping(nn.Module):
    """3x3 convolutions of stride 2, widths doubling, between two affine maps: (B, C, *size) -> (B, *grid, dim).

    `patch` is a power of two. (Lu et al., DHVT, 2022, section 3.2: SOPE.)
    """

    def __init__(self, rank: int, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        steps = patch.bit_length() - 1
        if patch < 2 or patch != 2**steps:
            raise SaccadeError(f"patch={patch}: each convolution halves the image, choose 2, 4, 8, 16, ...")
        channels = 3 if in_chans == 1 else in_chans
        widths = [channels, *(dim // 2**step for step in reversed(range(steps)))]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Sequential(*conv_norm(rank, before, after, stride=2)), nn.GELU()]
        self.before, self.after = PixelAffine(channels, 1), Affine(dim, 1)
        self.convs = nn.Sequential(*(layers if steps == 1 else layers[:-1]))
        self.gray = in_chans == 1

    def forward(self, image: Tensor) -> Tensor:
        x = image.movedim(1, -1)
        x = x.expand(*x.shape[:-1], 3) if self.gray else x.contiguous()
        return self.after(self.convs(self.before(x)))


class DHVT(Plain):
    """A Plain with overlapping patches, a class token and no position table."""

    undecayed = ("prefix",)

    def __init__(self, dim: int, depth: int, heads: int, *, patch: int, ratio: float, in_chans: int = 3,
                 **options: Any) -> None:
        def block(site: Site, mixer: nn.Module, **common: Any) -> HybridBlock:
            return HybridBlock(site, mixer, mlp=lambda dim: DynamicAggregation(site.rank, dim, int(dim * ratio)),
                               **common)

        super().__init__(dim, depth, heads, patch=patch, mixer=HeadInteraction, block=block, in_chans=in_chans,
                         **options)
        self.stem = Overlapping(len(self.grid), in_chans, dim, patch)  # type: ignore[assignment]
        self.register_parameter("position", None)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The sequence (B, 1 + N, C) that enters the first block, and the grid of its N tokens."""
        x = self.stem(image)
        prefix = None if self.prefix is None else self.prefix.expand(x.shape[0], -1, -1)
        return join(x, prefix), tuple(x.shape[1:-1])


_CIFAR: dict[str, Any] = dict(img_size=32, num_classes=100)
SIZES: dict[str, dict[str, Any]] = {
    f"dhvt_{size}_{data}_patch{patch}": dict(dim=dim, heads=heads, patch=patch) | more
    for data, patch, more, both in (("imagenet", 16, {}, (3, 6)), ("domain", 16, dict(num_classes=345), (4, 6)),
                                    ("cifar", 4, _CIFAR, (4, 8)), ("cifar", 2, _CIFAR, (4, 8)))
    for size, dim, heads in zip(("tiny", "small"), (192, 384), both, strict=True)
}
SIZES["dhvt_nano"] = dict(dim=64, depth=4, heads=2, patch=4, img_size=32)


def dhvt(
    dim: int,
    heads: int,
    patch: int,
    depth: int = 12,
    ratio: float = 4.0,
    mixer: Any = None,
    **common: Any,
) -> DHVT:
    """A DHVT of a size."""
    return DHVT(dim, depth, heads, patch=patch, ratio=ratio, replace=mixer, **common)


def _flat(value: Tensor) -> Tensor:
    return value.flatten()


MIXER: KeyMap = (
    (r"ht_proj\.(.*)", r"summary.\1"),
    (r"ht_norm\.(.*)", r"norm.\1"),
    (r"pos_embed", "identity"),
)
AGGREGATION: KeyMap = (
    (r"conv2\.(.*)", r"local.\1"),
    (r"conv1\.(.*)", r"fc1.\1", pointwise),
    (r"conv3\.(.*)", r"fc2.\1", pointwise),
    (r"bn(\d)\.(.*)", r"norm\1.\2"),
    (r"excitation\.(.*)", r"excite.\1"),
)
AUTHORS: KeyMap = (
    (r"patch_embed\.proj\.(.*)", r"stem.convs.\1"),
    *((rf"patch_embed\.{theirs}_affine\.{value}", f"stem.{ours}.{name}", _flat)
      for theirs, ours in (("pre", "before"), ("post", "after"))
      for value, name in (("alpha", "weight"), ("beta", "bias"))),
    (r"cls_token", "prefix", without_first_axis),
    *within(MIXER, r"blocks\.(\d+)\.attn\.", r"blocks.\1.mixer."),
    (r"blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
    *within(AGGREGATION, r"blocks\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
)
TAPS = {"patch_embed": "stem", r"block(\d+)": r"blocks.\1"}
