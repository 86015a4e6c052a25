"""EcoFormer: queries and keys are short binary codes, so that attention needs additions and linear cost.

One projection gives queries and keys. Its unit tokens x_i are hashed by their Gaussian similarity to m anchors a,
    s_i = sign(A (exp(-|x_i - a|^2 / 2 sigma) - mu)) in {-1, 1}^b,  sigma the mean of |x - a|^2 of a head,
and the inner product of two codes, shifted by b + 1 to be positive, is the similarity of two tokens,
    out_i = (s_i sum_j s_j v_j^T + (b + 1) v_i) / (s_i sum_j s_j + (b + 1) N),
in any order of the sums: N b d instead of N^2 d. The last stage keeps softmax attention. The hash functions A, mu and a
are not trained with the network but learned from its attention (`learn_hash_functions(model, images)`), once, before it
is finetuned; gradients pass the sign where its argument is in (-1, 1).

Liu, Pan, He, Cai, Zhuang, "EcoFormer: Energy-Saving Attention with Linear Complexity", 2022, section 4.

The hosts are PVT v2 and Twins-SVT, whose local windows are gone too: patches of 4 pixels that 2x2 convolutions halve, a
depthwise convolution added after the first block of a stage, a norm at the end alone.

Any grid: tokens are a set; in Twins, rows and columns that no patch fills are left out. Quirks kept: the shift enters
the denominator once a token, but the numerator with the token's own value alone; until hash functions are learned,
anchors and A are random and mu is exp(-1/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import exp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import create_model, hybrid_mixer
from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone
from saccade.core.keymap import Dropped, KeyMap, pvt_names, within, without_first_axis
from saccade.core.record import recording
from saccade.core.site import MixerFactory, Site
from saccade.core.template import Template
from saccade.parts.attention import Attention, check_heads
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.convolution import depthwise
from saccade.parts.merging import ConvMerging
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed
from saccade.parts.tokens import join, split

_ADDRESS = "https://github.com/ziplab/EcoFormer/releases/download/v1.0/"
_PVT = tuple(f"ecoformer_pvt_v2_b{number}" for number in range(5))
_PUBLISHED = (*_PVT, "ecoformer_twins_svt_s")

CARD = Card(
    "EcoFormer: Energy-Saving Attention with Linear Complexity",
    authors="Liu, Pan, He, Cai, Zhuang",
    year=2022,
    systems=("ecoformer",),
    arxiv="2209.09004",
    code="ziplab/EcoFormer@a277f9e",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper, code",
    keywords="kernelized hashing attention, binary codes, linear attention, Hamming distance, binarization, energy",
    kinds=("backbone", "mixer"),
    mixers={"kernelized_hashing": "KernelizedHashing"},
    macs=dict(zip(_PUBLISHED, (0.54e9, 2.03e9, 3.85e9, 6.54e9, 9.57e9, 2.72e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (70.44, 78.38, 81.28, 81.96, 81.90, 80.22), strict=True)),
    aliases={f"alt_gvt_{size}_ecoformer": f"ecoformer_twins_svt_{size[0]}" for size in ("small", "base", "large")},
    weights={name: Weights(f"{_ADDRESS}{theirs}_ecoformer.pth", licence="Apache-2.0")
             for name, theirs in zip(_PUBLISHED, (*(f"pvtv2_b{number}" for number in range(5)), "twins_svt_s"),
                                     strict=True)},
    goldens=("ecoformer_pvt_v2_b0", "op_ecoformer_attention"),
    tests=("tests/papers/test_ecoformer.py",),
)


class HashFunctions(nn.Module):
    """Codes of unit tokens, b bits each: (B, h, N, d) -> (B, h, N, b) of -1 and 1.

    The functions are buffers. (Liu et al., EcoFormer, 2022, section 4.1.)
    """

    weight: Tensor
    anchors: Tensor
    mean: Tensor

    def __init__(self, heads: int, dim: int, bits: int, anchors: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(heads, bits, anchors))
        self.register_buffer("anchors", F.normalize(torch.randn(heads, anchors, dim), dim=-1))
        self.register_buffer("mean", torch.full((heads, 1, anchors), exp(-0.5)))

    def kernel(self, unit: Tensor) -> Tensor:
        """exp(-|x - a|^2 / 2 sigma): (B, h, N, d) -> (B, h, N, m)."""
        if recording():  # the explicit form, whose arithmetic is declared
            distance = (unit[..., None, :] - self.anchors[:, None]).square().sum(-1)
        else:
            products = unit @ self.anchors.mT
            distance = 1 + self.anchors.square().sum(-1)[:, None] - 2 * products
        return torch.exp(distance / (-2 * distance.mean((-2, -1), keepdim=True)))

    def forward(self, unit: Tensor) -> Tensor:
        projected = (self.kernel(unit) - self.mean) @ self.weight.mT
        codes = projected.sign()
        if not torch.is_grad_enabled():
            return codes
        hard = projected.clamp(-1, 1)
        return codes.detach() + (hard - hard.detach())

    @torch.no_grad()
    def learn(self, unit: Tensor, topk: int = 10, steps: int = 100, rate: float = 5e-4) -> list[float]:
        """Learn the functions from the similarities of `unit` (B, h, N, d); the loss of each bit.

        The similarity S of a token is 1 to the `topk` most similar ones, -1 to the least similar, else 0. Anchors are
        tokens of the first image, mu is the mean of the kernel. Bit after bit, `steps` of SGD minimise
        -y^T R y / (N b) for y = tanh(K a / 2), R = b S minus y y^T of the bits before; the result is kept where its
        signs have a lower loss than those of the start. Here R is never written out: S has 2 `topk` entries a row, and
        y^T (z z^T) y = (y z)^2. (Equation 9.)
        """
        tokens, (bits, anchors) = unit.shape[-2], self.weight.shape[-2:]
        if tokens < max(anchors, 2 * topk):
            raise SaccadeError(f"{tokens} tokens are too few to learn hash functions from, which takes {anchors} "
                               f"anchors and {topk} similar and {topk} dissimilar tokens: give larger images")
        self.anchors.copy_(unit[0, :, torch.randperm(tokens, device=unit.device)[:anchors]])
        kernel = self.kernel(unit)
        self.mean.copy_(kernel.mean((0, -2))[:, None])
        kernel = kernel - self.mean
        near, far = zip(*(extremes(image, topk) for image in unit), strict=True)
        pairs = torch.cat([torch.stack(near), torch.stack(far)], -1).flatten(-2)  # (B, h, N 2 topk)
        sign = unit.new_ones(2 * topk)
        sign[topk:] = -1
        earlier: list[Tensor] = []

        def loss(y: Tensor) -> Tensor:
            similar = (y.gather(-1, pairs).unflatten(-1, (tokens, -1)) @ sign * y).sum(-1)
            seen = sum((y * code).sum(-1).square() for code in earlier)
            return (seen - bits * similar).mean() / (tokens * bits)

        losses = []
        for bit in range(bits):
            start = self.weight[:, bit].clone()
            moved = start.clone().requires_grad_()
            optimizer = torch.optim.SGD([moved], lr=rate, momentum=0.9, nesterov=True)
            for _ in range(steps):
                with torch.enable_grad():
                    value = loss((kernel @ moved[..., None]).squeeze(-1).div(2).tanh())
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            codes = [((kernel @ a[..., None]).squeeze(-1) > 0).to(unit.dtype) * 2 - 1 for a in (start, moved.detach())]
            before, after = map(float, map(loss, codes))
            if after < before:
                self.weight[:, bit] = moved.detach()
            earlier.append(codes[after < before])
            losses.append(min(before, after))
        return losses


def extremes(unit: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The `topk` most and least similar tokens of each: (h, N, d) -> twice (h, N, topk)."""
    similarity = unit @ unit.mT
    return similarity.topk(topk).indices, similarity.topk(topk, largest=False).indices


class KernelizedHashing(nn.Module):
    """Attention by inner products of binary codes, in linear cost: (B, *grid, C) -> (B, *grid, C).

    (Liu et al., EcoFormer, 2022, section 4.2.)
    """

    ranks, prefix = (1, 2, 3), True
    template = Template("H(q) H(k)^T, H binary codes", "divided by its sum", "sum of v")

    def __init__(self, site: Site, bits: int = 16, anchors: int = 25, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = site.heads
        self.hash = HashFunctions(site.heads, check_heads(site), bits, anchors)
        self.qk = nn.Linear(site.dim, site.dim, bias=qkv_bias)
        self.v = nn.Linear(site.dim, site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Any:
        tokens = join(x, prefix)
        qk, v = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.qk, self.v))
        codes = self.hash(F.normalize(qk, dim=-1))
        shift = codes.shape[-1] + 1
        weights = codes @ codes.sum(-2)[..., None] + shift * codes.shape[-2]
        out = (codes @ (codes.mT @ v) + shift * v) / weights
        return split(self.proj(out.transpose(1, 2).flatten(-2)), x, prefix)

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 3 N C^2 for projections, N h m b for codes, 2 N b C + N h b for sums (additions alone)."""
        tokens, (heads, bits, anchors) = torch.Size(grid).numel() + prefix, self.hash.weight.shape
        return tokens * (3 * site.dim**2 + heads * bits * (anchors + 1) + 2 * bits * site.dim)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def learn_hash_functions(
    model: nn.Module, images: Tensor, topk: int = 10, steps: int = 100, rate: float = 5e-4
) -> dict[str, list[float]]:
    """Learn the hash functions of all kernelized hashing in `model` from a batch; the loss of each bit, by module name.

    In one forward, as the authors do in that of the first training step: each layer learns from what the fitted ones
    before it give. Anchors are drawn at random. (Liu et al., EcoFormer, 2022, section 4.1.)
    """
    losses: dict[str, list[float]] = {}

    def learn(name: str) -> Any:
        def hook(module: HashFunctions, inputs: tuple[Tensor]) -> None:
            losses[name] = module.learn(inputs[0], topk, steps, rate)
        return hook

    handles = [module.register_forward_pre_hook(learn(name)) for name, module in model.named_modules()
               if isinstance(module, HashFunctions)]
    if not handles:
        raise SaccadeError(f"{type(model).__name__} has no kernelized hashing: there are no hash functions to learn")
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return losses


class FirstBlock(Block):
    """A block, then x += depthwise convolution of x: where a stage of Twins finds out about positions.

    (Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", 2021, section 3.1.)
    """

    def __init__(self, site: Site, mixer: nn.Module, **options: Any) -> None:
        super().__init__(site, mixer, **options)
        self.local = depthwise(site.rank, site.dim, 3)

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        x = super().forward(x, **optional)
        return x + self.local(x)


_TWINS: dict[str, Any] = dict(builder="ecoformer_twins")
SIZES: dict[str, dict[str, Any]] = {
    **{name: dict(host=name.removeprefix("ecoformer_")) for name in _PVT},
    "ecoformer_nano": dict(host="pvt_v2_nano", stages=3),
    "ecoformer_twins_svt_s": _TWINS | dict(dims=(64, 128, 256, 512), depths=(2, 2, 10, 4)),
    "ecoformer_twins_svt_b": _TWINS | dict(dims=(96, 192, 384, 768), depths=(2, 2, 18, 2)),
    "ecoformer_twins_svt_l": _TWINS | dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2)),
    "ecoformer_twins_nano": _TWINS | dict(dims=(32, 64, 128), depths=(1, 2, 2), patch=2, img_size=32),
}


def own_mixer(last: int, bits: int, anchors: int) -> MixerFactory:
    """Kernelized hashing in all stages before the `last`, which has plain attention."""

    def own(site: Site) -> nn.Module:
        return KernelizedHashing(site, bits, anchors) if site.stage < last else Attention(site)

    return own


def ecoformer(
    host: str, stages: int = 4, bits: int = 16, anchors: int = 25, mixer: Any = None, **common: Any
) -> Backbone:
    """A PVT v2 (`host`) with kernelized hashing in all of its `stages` but the last, which has plain attention."""
    return create_model(host, mixer=hybrid_mixer(own_mixer(stages - 1, bits, anchors), mixer), **common)


def ecoformer_twins(
    dims: Sequence[int], depths: Sequence[int], patch: int = 4, bits: int = 16, anchors: int = 25, mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A Twins-SVT with kernelized hashing in all of its stages but the last, which has plain attention."""

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        return (Block if site.index else FirstBlock)(site, mixer, drop_path=drop_path)

    return Pyramid(
        dims, depths, [dim // 32 for dim in dims], stride=patch,
        stem=partial(PatchEmbed, stride=patch, kernel=patch, norm=nn.LayerNorm),
        downsample=partial(ConvMerging, kernel=2), block=block, mixer=own_mixer(len(dims) - 1, bits, anchors),
        norm=LAYER_NORM, replace=mixer, **common,
    )


MIXER: KeyMap = (
    Dropped(r"fast_attention\.projection_matrix", "random features that the authors' forward does not use"),
    (r"fast_attention\.ksh\.A", "hash.weight"),
    (r"fast_attention\.ksh\.mvec", "hash.mean", without_first_axis),
    (r"fast_attention\.ksh\.anchor", "hash.anchors", without_first_axis),
    (r"to_(qk|v)\.(.*)", r"\1.\2"),
    (r"(.*)", r"\1"),
)
_ATTENTION = within(MIXER, r"attn\.", "mixer.")
AUTHORS: KeyMap = (
    *((rf"patch_embeds\.0\.{layer}\.(.*)", rf"stem.{layer}.\1") for layer in ("proj", "norm")),
    (r"patch_embeds\.(\d+)\.proj\.(.*)", r"stages.\1.downsample.0.\2"),
    (r"patch_embeds\.(\d+)\.norm\.(.*)", r"stages.\1.downsample.1.\2"),
    (r"pos_block\.(\d+)\.proj\.0\.(.*)", r"stages.\1.blocks.0.local.\2"),
    *within((*_ATTENTION, (r"(.*)", r"\1")), r"blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    *pvt_names((*_ATTENTION, (r"mlp\.dwconv\.dwconv\.(.*)", r"mlp.local.\1"))),
)
TAPS = {f"stage{number + 1}": f"stages.{number}" for number in range(4)}
