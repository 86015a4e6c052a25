"""Spikformer and Spikformer V2: attention between spikes, without softmax and without multiplications.

Neurons leak, integrate and fire over T steps: h_t = v_{t-1} + (x_t - v_{t-1}) / tau, s_t = [h_t >= threshold],
v_t = (1 - s_t) h_t. Queries, keys and values are spikes, so that q k^T counts coincidences, is never negative and needs
no softmax:
    out = fire(norm(W fire_{1/2}((q k^T) v * scale))),   q, k, v = fire(norm(W x)).
The image is the constant input of all steps; the scores read the mean over the steps. V2 replaces max pooling, which
loses spikes, by a stem of strided convolutions with residual pairs between, and learns from masked images first.

Zhou, Zhu, He, Wang, Yan, Tian, Yuan, "Spikformer: When Spiking Neural Network Meets Transformer", 2023, section 3.
Zhou, Che, Fang, Tian, Zhu, Yan, Tian, Yuan, "Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN
Ticket", 2024.

Any grid: nothing is bound to a size; V1 pools to ceil(side / 2), V2 zero-pads the image to whole patches.
Quirks kept: blocks of V1 hold two norms that no forward uses, and count them; their drop path is ours. V2's kernels and
widths are those with which all three published parameter counts come out; its code is not published.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, pointwise, within
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.spiking import fire
from saccade.parts.attention import Attention, check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import grid_conv
from saccade.parts.norm import BatchNorm
from saccade.parts.pixels import check_ratio, image_of, normalised, patches_of, random_mask, seen_numbers
from saccade.parts.plain import Plain, TokenBlock
from saccade.parts.stem import pad_image
from saccade.parts.tokens import global_tokens

_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

CARD = Card(
    "Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket (and Spikformer)",
    authors="Zhou, Che, Fang, Tian, Zhu, Yan, Tian, Yuan; Zhou, Zhu, He, Wang, Yan, Tian, Yuan",
    year=2024,
    systems=("spikformer_v2",),
    arxiv="2401.02020, 2209.15425",
    code="ZK-Zhou/spikformer@6212689 (the first version)",
    licence="MIT",
    read="paper, code",
    keywords="spiking neural network, spiking self-attention, LIF neuron, surrogate gradient, masked pre-training",
    kinds=("backbone", "mixer", "pretraining"),
    mixers={"spiking_self_attention": "DirectSpikingAttention"},
    params={"spikformer_8_384": 16.81e6, "spikformer_6_512": 23.37e6, "spikformer_8_512": 29.68e6,
            "spikformer_10_512": 36.01e6, "spikformer_8_768": 66.34e6, "spikformer_cifar_4_256": 4.15e6,
            "spikformer_cifar_2_384": 5.76e6, "spikformer_cifar_4_384": 9.32e6, "spikformer_v2_8_384": 29.11e6,
            "spikformer_v2_8_512": 51.55e6, "spikformer_v2_16_768": 172.7e6},
    top1={"spikformer_8_384": 70.24, "spikformer_6_512": 72.46, "spikformer_8_512": 73.38, "spikformer_10_512": 73.68,
          "spikformer_8_768": 74.81, "spikformer_v2_8_512": 80.38, "spikformer_v2_16_768": 81.10},
    goldens=("spikformer_cifar_4_384", "op_spikformer_ssa", "op_spikformer_ssa_cifar", "op_lif_multistep"),
    tests=("tests/papers/test_spikformer_v2.py",),
)


class Neurons(nn.Module):
    """`fire` for a batch that holds `steps` steps one after the other: (T x B, ...) -> (T x B, ...)."""

    def __init__(self, steps: int, threshold: float = 1.0) -> None:
        super().__init__()
        if steps < 1:
            raise SaccadeError(f"steps={steps}: neurons need at least 1 time step")
        self.steps, self.threshold = steps, threshold

    def forward(self, current: Tensor) -> Tensor:
        return fire(current.unflatten(0, (self.steps, -1)), self.threshold).flatten(0, 1)

    def driven(self, current: Tensor) -> Tensor:
        """The spikes of a current (B, ...) that is the same in all steps: (T x B, ...)."""
        return fire(current.expand(self.steps, *current.shape), self.threshold).flatten(0, 1)


class SpikingAttention(nn.Module):
    """fire(norm(proj(fire((q k^T) v scale)))) of all tokens of a step: (T x B, *grid, C) -> same, steps outermost.

    q (k^T v) is the same number and is what runs; with `pairwise` q k^T is what counts, and what `record` sees.
    """

    ranks = (1, 2, 3)
    projections = ("qkv", "proj")

    def __init__(
        self, site: Site, steps: int = 4, threshold: float = 1.0, scale: float = 0.125, qkv_bias: bool = False,
        pairwise: bool = False,
    ) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.steps, self.scale, self.pairwise = site.heads, steps, scale, pairwise
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.qkv_norm = BatchNorm(3 * site.dim)
        self.qkv_neurons = Neurons(steps, threshold)
        self.neurons = Neurons(steps, threshold / 2)
        self.proj = nn.Linear(site.dim, site.dim)
        self.proj_norm = BatchNorm(site.dim)
        self.proj_neurons = Neurons(steps, threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.qkv_neurons(self.qkv_norm(self.qkv(x))))

    def mix(self, spikes: Tensor) -> Tensor:
        """Spikes of queries, keys and values (T x B, *grid, 3 C) -> spikes (T x B, *grid, C)."""
        q, k, v = spikes.flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.pairwise and recording():
            counts = q @ k.mT * self.scale
            note(counts, lambda: global_tokens(q.shape[-2], q.device))
            out = counts @ v
        else:
            out = q @ (k.mT @ v) * self.scale
        out = self.neurons(out.transpose(1, 2).flatten(2).unflatten(1, spikes.shape[1:-1]))
        return self.proj_neurons(self.proj_norm(self.proj(out)))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds a step: 4 N C^2 for the projections, 2 N C d for q (k^T v) (pairwise 2 N^2 C)."""
        tokens = torch.Size(grid).numel()
        return 4 * tokens * site.dim**2 + self._products(site, tokens)

    def _products(self, site: Site, tokens: int) -> int:
        return 2 * tokens * site.dim * (tokens if self.pairwise else site.dim // site.heads)

    def reach(self, site: Site) -> None:
        """Every token counts its coincidences with every other."""
        return None


class DirectSpikingAttention(SpikingAttention):
    """Spiking attention in a network of numbers: x drives `steps` steps, and the rates come out.

    (B, *grid, C) -> (B, *grid, C), in multiples of 1 / steps. The projections of a constant input are made once.
    """

    template = Template("q k^T of spikes", "a fixed scale", "sum of v, fired again")

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.mix(self.qkv_neurons.driven(self.qkv_norm(self.qkv(x))))
        return spikes.unflatten(0, (self.steps, -1)).mean(0)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 3 N C^2 for q, k, v; then in each step N C^2 for the projection and the products."""
        tokens = torch.Size(grid).numel()
        return 3 * tokens * site.dim**2 + self.steps * (tokens * site.dim**2 + self._products(site, tokens))


class SpikingMlp(nn.Module):
    """fire(norm(fc2(fire(norm(fc1(x)))))): (T x B, N, C) -> same."""

    def __init__(self, dim: int, steps: int, threshold: float = 1.0, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.norm1, self.neurons1 = nn.Linear(dim, hidden), BatchNorm(hidden), Neurons(steps, threshold)
        self.fc2, self.norm2, self.neurons2 = nn.Linear(hidden, dim), BatchNorm(dim), Neurons(steps, threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons2(self.norm2(self.fc2(self.neurons1(self.norm1(self.fc1(x))))))


class SpikingBlock(TokenBlock):
    """x += mixer(x); x += mlp(x): sums of spikes, (T x B, N, C). V1's checkpoints hold norms that do nothing."""

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        tokens = tokens + self.scale1(self.mixer(tokens.unflatten(1, grid)).flatten(1, -2))
        return tokens + self.scale2(self.mlp(tokens))


class SpikingConv(nn.Module):
    """fire(norm(conv(x))): (T x B, *grid, C) -> (T x B, *grid', C')."""

    def __init__(self, rank: int, dim: int, out_dim: int, steps: int, threshold: float, kernel: int = 3) -> None:
        super().__init__()
        shape = dict(padding=1) if kernel == 3 else dict(stride=kernel)
        self.conv = grid_conv(rank, dim, out_dim, kernel, bias=False, **shape)
        self.norm = BatchNorm(out_dim)
        self.neurons = Neurons(steps, threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons(self.norm(self.conv(x)))

    def driven(self, image: Tensor) -> Tensor:  # one (B, *grid, C) for all steps
        return self.neurons.driven(self.norm(self.conv(image)))


class PatchSplitting(nn.Module):
    """V1's stem: convolutions, max pooling after the last `pools`, position: (B, C, *size) -> (T x B, *grid, dim)."""

    def __init__(self, rank: int, in_chans: int, dim: int, steps: int, threshold: float, pools: int) -> None:
        super().__init__()
        widths = (in_chans, dim // 8, dim // 4, dim // 2, dim)
        self.layers = nn.ModuleList(SpikingConv(rank, before, after, steps, threshold)
                                    for before, after in zip(widths, widths[1:], strict=False))
        self.position = SpikingConv(rank, dim, dim, steps, threshold)
        self.pools = pools

    def forward(self, image: Tensor) -> Tensor:
        x = image.movedim(1, -1).contiguous()
        for number, layer in enumerate(self.layers):
            x = layer(x) if number else layer.driven(x)  # type: ignore[operator]
            if number >= 4 - self.pools:
                x = _POOL[x.ndim - 2](x.movedim(-1, 1), 3, 2, 1).movedim(1, -1).contiguous()
        return x + self.position(x)


class ConvolutionalStem(nn.Module):
    """V2's stem: in each stage a convolution over patches of 2, and a residual pair of 3x3 ones, `ratio` wide between.

    (B, C, *size) -> (T x B, *grid, dim), stride 2^stages.
    """

    def __init__(
        self, rank: int, in_chans: int, dim: int, steps: int, threshold: float, ratio: int = 4, stages: int = 4
    ) -> None:
        super().__init__()
        widths = [in_chans, *(dim // 2**(stages - 1 - number) for number in range(stages))]
        self.lower = nn.ModuleList(SpikingConv(rank, before, after, steps, threshold, kernel=2)
                                   for before, after in zip(widths, widths[1:], strict=False))
        self.pairs = nn.ModuleList(nn.Sequential(SpikingConv(rank, width, ratio * width, steps, threshold),
                                                 SpikingConv(rank, ratio * width, width, steps, threshold))
                                   for width in widths[1:])

    def forward(self, image: Tensor) -> Tensor:
        x = pad_image(image, 2**len(self.lower)).movedim(1, -1).contiguous()
        for number, (lower, pair) in enumerate(zip(self.lower, self.pairs, strict=True)):
            x = lower(x) if number else lower.driven(x)  # type: ignore[operator]
            x = x + pair(x)
        return x


class Spikformer(Plain):
    """A Plain of spikes: `steps` steps stand one after the other in the batch, from the stem to the scores.

    Features, tokens and scores are means over the steps. Another mixer sees each step by itself.
    """

    undecayed = ()

    def __init__(
        self, dim: int, depth: int, heads: int, *, steps: int, stem: Callable[[int, int, int], nn.Module],
        in_chans: int = 3, global_pool: str = "avg", **options: Any,
    ) -> None:
        super().__init__(dim, depth, heads, prefix=0, in_chans=in_chans, global_pool=global_pool, **options)
        self.steps = steps
        self.stem = stem(len(self.grid), in_chans, dim)  # type: ignore[assignment]
        self.norm = nn.Identity()
        self.register_parameter("position", None)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The sequence (T x B, N, C) that enters the first block, and its grid."""
        x = self.stem(image)
        return x.flatten(1, -2), tuple(x.shape[1:-1])

    def features(self, image: Tensor) -> list[Tensor]:
        """The mean over the steps after each block, (B, C, *grid), channels-last in memory."""
        tokens, grid = self.tokens(image)
        maps = []
        for block in self.blocks:
            tokens = block(tokens, 0, grid)
            maps.append(tokens.unflatten(0, (self.steps, -1)).mean(0).unflatten(1, grid).movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The mean over the steps after the last block, (B, N, C)."""
        tokens, grid = self.tokens(image)
        for block in self.blocks:
            tokens = block(tokens, 0, grid)
        return tokens.unflatten(0, (self.steps, -1)).mean(0)


class MaskedSpikes(nn.Module):
    """Pre-training of a Spikformer V2: guess the pixels of masked patches from the spikes of those left.

    loss = mean over the masked patches of |guess - pixels|^2, pixels normalised a patch. Masked patches are blank in
    the stem and absent from the blocks. The decoder, `depth` blocks of attention of `dim` channels, does not spike.
    """

    def __init__(self, model: Spikformer, ratio: float = 0.5, dim: int = 256, depth: int = 2, heads: int = 8) -> None:
        super().__init__()
        self.model, self.ratio = model, check_ratio("spikformer_v2", ratio)
        self.patch = model.feature_info[0]["reduction"]
        self.embed, self.missing = nn.Linear(model.num_features, dim), nn.Parameter(torch.randn(dim) * 0.02)
        self.position = nn.Parameter(torch.randn(torch.Size(model.grid).numel(), dim) * 0.02)
        site = Site(dim, heads, grid=model.grid)
        self.decoder = nn.Sequential(*(Block(site, Attention(site)) for _ in range(depth)), nn.LayerNorm(dim))
        self.pixels = nn.Linear(dim, model.in_chans * self.patch ** len(model.grid))

    def forward(self, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """{"loss", "guess" (B, N, pixels), "mask"} of images of the native size.

        `mask` (B, N), drawn if not given, hides as many patches in each image.
        """
        size = tuple(side * self.patch for side in self.model.grid)
        if tuple(image.shape[2:]) != size:
            raise SaccadeError(f"images of {tuple(image.shape[2:])} pixels: pre-training takes the native {size}")
        target = patches_of(image, self.patch)
        if mask is None:
            mask = random_mask(target.shape[0], target.shape[1], self.ratio, image.device)
        blank = image_of((~mask[..., None]).to(image.dtype).expand_as(target), self.patch, self.model.grid)
        x = self.model.stem(image * blank).flatten(1, -2)
        left = seen_numbers(mask)
        places = left.repeat(self.model.steps, 1)[..., None]
        tokens = x.gather(1, places.expand(-1, -1, x.shape[-1]))
        for block in self.model.blocks:
            tokens = block(tokens, 0, (tokens.shape[1],))
        seen = self.embed(tokens.unflatten(0, (self.model.steps, -1)).mean(0))
        whole = self.missing.to(seen.dtype).expand(*mask.shape, -1).scatter(1, left[..., None].expand_as(seen), seen)
        guess = self.pixels(self.decoder(whole + self.position))
        error = (guess - normalised(target)).square().mean(-1)
        return {"loss": (error * mask).sum() / mask.sum(), "guess": guess, "mask": mask}


_V1: dict[str, Any] = dict(builder="spikformer")
_CIFAR = _V1 | dict(patch=4, heads=12, pairwise=True, qkv_bias=True, img_size=32, num_classes=10)
_V2: dict[str, Any] = dict(builder="spikformer_v2")
SIZES: dict[str, dict[str, Any]] = {
    "spikformer_8_384": _V1 | dict(dim=384, depth=8, heads=8),
    "spikformer_6_512": _V1 | dict(dim=512, depth=6, heads=8),
    "spikformer_8_512": _V1 | dict(dim=512, depth=8, heads=8),
    "spikformer_10_512": _V1 | dict(dim=512, depth=10, heads=8),
    "spikformer_8_768": _V1 | dict(dim=768, depth=8, heads=12),
    "spikformer_cifar_4_256": _CIFAR | dict(dim=256, depth=4, heads=8),
    "spikformer_cifar_2_384": _CIFAR | dict(dim=384, depth=2),
    "spikformer_cifar_4_384": _CIFAR | dict(dim=384, depth=4),
    "spikformer_nano": _CIFAR | dict(dim=64, depth=4, heads=2),
    "spikformer_v2_8_384": _V2 | dict(dim=384, depth=8, heads=8),
    "spikformer_v2_8_512": _V2 | dict(dim=512, depth=8, heads=8),
    "spikformer_v2_16_768": _V2 | dict(dim=768, depth=16, heads=12, steps=1),
    "spikformer_v2_nano": _V2 | dict(dim=64, depth=4, heads=2, stages=2, img_size=32),
}

def spikformer(
    dim: int, depth: int, heads: int, patch: int = 16, steps: int = 4, threshold: float = 1.0, ratio: float = 4.0,
    pairwise: bool = False, qkv_bias: bool = False, mixer: Any = None, **common: Any,
) -> Spikformer:
    """A Spikformer: patches of 16 or 4 pixels (max pooling after all convolutions or the last two)."""
    if patch not in (2, 4, 8, 16):
        raise SaccadeError(f"patch={patch}: the stem halves the image one to four times; choose 2, 4, 8 or 16")
    return _network(dim, depth, heads, steps, threshold, ratio, mixer, patch=patch, norm=nn.LayerNorm,
                    stem=partial(PatchSplitting, steps=steps, threshold=threshold, pools=patch.bit_length() - 1),
                    own=partial(SpikingAttention, pairwise=pairwise, qkv_bias=qkv_bias), **common)


def spikformer_v2(
    dim: int, depth: int, heads: int, steps: int = 4, threshold: float = 1.0, ratio: float = 4.0, stages: int = 4,
    scale: float = 0.25, mixer: Any = None, **common: Any,
) -> Spikformer:
    """A Spikformer V2, whose stem of `stages` stages has a stride of 2^stages."""
    return _network(dim, depth, heads, steps, threshold, ratio, mixer, patch=2**stages, norm=lambda dim: nn.Identity(),
                    stem=partial(ConvolutionalStem, steps=steps, threshold=threshold, stages=stages),
                    own=partial(SpikingAttention, scale=scale), **common)


def _network(
    dim: int, depth: int, heads: int, steps: int, threshold: float, ratio: float, mixer: Any, own: Any, **common: Any
) -> Spikformer:
    neurons: dict[str, Any] = dict(steps=steps, threshold=threshold)
    return Spikformer(dim, depth, heads, steps=steps, mixer=partial(own, **neurons), replace=mixer,
                      block=partial(SpikingBlock, mlp=partial(SpikingMlp, ratio=ratio, **neurons)), **common)


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """The threshold of a golden, whose note says how far below the published one it is: no neuron fired there."""
    factor = re.search(r"v_threshold multiplied by ([\d.]*\d)", golden["note"])
    return {"threshold": float(factor[1])} if factor else {}


MIXER: KeyMap = (
    Dropped(r".*_bn\d?\.num_batches_tracked", "a counter"),
    *((rf"{name}_(?:linear|conv)\.(.*)", rf"qkv.\1#{number}", pointwise) for number, name in enumerate("qkv")),
    *((rf"{name}_bn\.(.*)", rf"qkv_norm.\1#{number}") for number, name in enumerate("qkv")),
    (r"proj_(?:linear|conv)\.(.*)", r"proj.\1", pointwise),
    (r"proj_bn\.(.*)", r"proj_norm.\1"),
)
MLP: KeyMap = ((r"(fc[12])_(?:linear|conv)\.(.*)", r"\1.\2", pointwise), (r"fc([12])_bn\.(.*)", r"norm\1.\2"))
STEM: KeyMap = (
    MIXER[0],
    (r"rpe_conv\.(.*)", r"position.conv.\1"),
    (r"rpe_bn\.(.*)", r"position.norm.\1"),
    (r"proj_conv\.(.*)", r"layers.0.conv.\1"),
    (r"proj_bn\.(.*)", r"layers.0.norm.\1"),
    (r"proj_conv(\d)\.(.*)", r"layers.\1.conv.\2"),
    (r"proj_bn(\d)\.(.*)", r"layers.\1.norm.\2"),
)
BLOCK: KeyMap = (*within(MIXER, r"attn\.", "mixer."), *within(MLP, r"mlp\.", "mlp."))
AUTHORS: KeyMap = (
    *within(STEM, r"patch_embed\.", "stem."),
    *within((*BLOCK, (r"(.*)", r"\1")), r"block\.(\d+)\.", r"blocks.\1."),
)
TAPS = {"patch_embed": "stem", r"block(\d+)": r"blocks.\1"}
