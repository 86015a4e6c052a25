"""MAXIM: a multi-stage U-Net for image restoration whose spatial mixing is two fixed-size gated MLPs, local and global.

Channels are split in two heads. One mixes the tokens inside each b x b block (local), the other the tokens that lie at
the same place of each cell of a g x g grid (dilated, global); both are gated MLPs, with weights free of the image size:
    gmlp(x) = x + W2 (u * (mix(norm(v)) + 1)),   u, v = split(gelu(W1 norm(x))).
Cross gating lets two maps gate each other: y <- Wy (y * g(x)) + y0, x <- Wx (x * g(y)) + x0 + y, g mixing the same way.
Each stage is a U-Net fed with the picture at several scales; supervised attention hands features to the next stage.

Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li, "MAXIM: Multi-Axis MLP for Image Processing", 2022, section 3.

Any grid: a map is zero-padded at the end to multiples of block and grid and cropped; pictures are reflected to 64.
Quirks kept: low-resolution levels use the block's size as their grid's; pictures are subsampled, not filtered. The
PyTorch port also holds 4.5 M parameters that it never uses: without them MAXIM-3S has the published 22.2 M.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap, flax, pointwise, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.convolution import grid_conv, on_grid
from saccade.parts.mlp import Mlp
from saccade.parts.multi_axis import BlockMix, Gmlp, GridMix, TwoAxes, norm, tanh_gelu
from saccade.parts.restoration.body import reflected
from saccade.parts.squeeze import SqueezeExcite

CARD = Card(
    "MAXIM: Multi-Axis MLP for Image Processing",
    authors="Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li",
    year=2022,
    systems=("maxim",),
    arxiv="2201.02973",
    code="google-research/maxim@31853b9",
    licence="Apache-2.0",
    read="abstract, code (JAX); operators also in the unlicensed vztu/maxim-pytorch (its first fifth)",
    keywords="multi-axis gated MLP, cross gating, spatial gating unit, block and grid, multi-stage U-Net, restoration",
    kinds=("restoration", "mixer"),
    mixers={"multi_axis_gmlp": "MultiAxisGmlp"},
    params={"maxim_s2": 14.1e6, "maxim_s3": 22.2e6},
    weights={  # the first of each size; theirs for other tasks load as checkpoint_path
        name: Weights(f"https://storage.googleapis.com/gresearch/maxim/ckpt/{task}/checkpoint.npz", layout="flax",
                      data=data)
        for name, task, data in (("maxim_s2", "Deraining/Rain13k", "Rain13k"), ("maxim_s3", "Denoising/SIDD", "SIDD"))
    },
    goldens=("op_maxim_multi_axis_gmlp", "op_maxim_cross_gating", "maxim_3s"),
    tests=("tests/papers/test_maxim_flax.py",),
)


def multiples(block: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """The sides that both whole blocks and whole cells divide."""
    return tuple(map(lcm, block, grid))


class MultiAxisGmlp(TwoAxes):
    """What the multi-axis gated MLP adds to the map: (B, *grid, C) -> (B, *grid, C).

    `block` and `cells` are the sides of the local blocks and of the global grid (8 each). (Tu et al., 2022, section
    3.2.)
    """

    ranks = (1, 2, 3)
    template = Template("w[i, j] in blocks and in grids", "layer norm of the gate", "sums of x, times x")

    def __init__(self, site: Site, block: Sequence[int] | None = None, cells: Sequence[int] | None = None) -> None:
        block, cells = tuple(block or (8,) * site.rank), tuple(cells or (8,) * site.rank)
        super().__init__(site.dim, Gmlp(site.dim, GridMix(cells)), Gmlp(site.dim, BlockMix(block)),
                         multiples(block, cells))
        self.tokens = prod(block) + prod(cells)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 10 N C^2 of projections and N C (b^2 + g^2) of token mixing, N counted with the padding."""
        tokens = prod(size + (-size) % side for size, side in zip(grid, self.multiple, strict=True))
        return tokens * site.dim * (10 * site.dim + self.tokens)

    def reach(self, site: Site) -> None:
        """The grid reaches across the whole map."""
        return None


class GatingWeights(TwoAxes):
    """The gate a map makes for another: (B, *grid, C) -> (B, *grid, C)."""

    def __init__(self, dim: int, block: tuple[int, ...], cells: tuple[int, ...]) -> None:
        super().__init__(dim, GridMix(cells, bias=1.0), BlockMix(block, bias=1.0), multiples(block, cells))


class CrossGating(nn.Module):
    """Two maps gate each other: x (B, H, W, X), y (B, h, w, Y) -> both (B, H, W, C).

    `upsample`: y comes at half the resolution. (Tu et al., 2022, section 3.3.)
    """

    def __init__(
        self, x_dim: int, y_dim: int, dim: int, block: Sequence[int], cells: Sequence[int], upsample: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(y_dim, dim, 2, 2) if upsample else None
        self.x_in = nn.Linear(x_dim, dim)
        self.y_in = nn.Linear(dim if upsample else y_dim, dim)
        self.x_norm, self.y_norm = norm(dim), norm(dim)
        self.x_fc, self.y_fc = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.activation = tanh_gelu()
        self.x_gate = GatingWeights(dim, tuple(block), tuple(cells))
        self.y_gate = GatingWeights(dim, tuple(block), tuple(cells))
        self.x_out, self.y_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x_in(x)
        y = self.y_in(y if self.up is None else on_grid(self.up, y))
        x_inner, y_inner = self.activation(self.x_fc(self.x_norm(x))), self.activation(self.y_fc(self.y_norm(y)))
        y = y + self.y_out(y_inner * self.x_gate(x_inner))
        return x + y + self.x_out(x_inner * self.y_gate(y_inner)), y


class ChannelAttention(nn.Module):
    """x + squeeze(inner(norm(x))), inner two 3x3 convolutions or, in the bottleneck, an MLP: (B, H, W, C) -> same."""

    def __init__(self, dim: int, convolve: bool = True) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.inner = nn.Sequential(
            grid_conv(2, dim, dim, 3, padding=1), nn.LeakyReLU(0.2), grid_conv(2, dim, dim, 3, padding=1)
        ) if convolve else Mlp(dim, 1.0, tanh_gelu)
        self.squeeze = SqueezeExcite(dim, dim // 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.squeeze(self.inner(self.norm(x)))


class Level(nn.Module):
    """z + groups(z), z = fc(x), a group a multi-axis gated MLP and channel attention: (B, H, W, I) -> (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int, side: int, groups: int, convolve: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(in_dim, dim)
        self.mixers = nn.ModuleList(MultiAxisGmlp(Site(dim), (side, side), (side, side)) for _ in range(groups))
        self.attentions = nn.ModuleList(ChannelAttention(dim, convolve) for _ in range(groups))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x = self.fc(x)
        for mixer, attention in zip(self.mixers, self.attentions, strict=True):
            x = x + mixer(x)
            x = attention(x)
        return x + shortcut


class Resized(nn.Linear):
    """A map resized (bilinear, antialiased) by 2^steps, then projected: (B, H, W, I) -> (B, 2^s H, 2^s W, C)."""

    def __init__(self, in_dim: int, dim: int, steps: int) -> None:
        super().__init__(in_dim, dim)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        if self.steps:
            size = [side << self.steps if self.steps > 0 else side >> -self.steps for side in x.shape[1:-1]]
            image = F.interpolate(x.movedim(-1, 1), size=size, mode="bilinear", antialias=True)
            x = image.movedim(1, -1).contiguous()
        return super().forward(x)


class Joined(nn.ModuleList):
    """Maps of all levels, each through its own layer, side by side in channels, the finest first or last."""

    def forward(self, maps: list[Tensor], finest_first: bool) -> Tensor:
        resized = [layer(x) for layer, x in zip(self, maps, strict=True)]
        return torch.cat(resized if finest_first else resized[::-1], -1)


class SupervisedAttention(nn.Module):
    """A stage's picture, and its features weighed by it for the next: (B, H, W, C), (B, H, W, I) -> both."""

    def __init__(self, dim: int, in_chans: int) -> None:
        super().__init__()
        self.features = grid_conv(2, dim, dim, 3, padding=1)
        self.picture = grid_conv(2, dim, in_chans, 3, padding=1)
        self.attention = grid_conv(2, in_chans, dim, 3, padding=1)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        picture = self.picture(x) + image
        return x + self.features(x) * torch.sigmoid(self.attention(picture)), picture


class UNet(nn.Module):
    """One stage; all lists go from the finest level to the coarsest.

    Pictures (B, H / 2^i, W / 2^i, I), and of the stage before its features, encoder and decoder maps -> the same of
    this stage: (pictures, features, encoder maps, decoder maps).
    """

    def __init__(self, dim: int, depth: int, groups: int, bottlenecks: int, in_chans: int, first: bool, last: bool):
        super().__init__()
        dims, sides = [dim << level for level in range(depth)], [16 if level < 2 else 8 for level in range(depth)]
        windows = [(side, side) for side in sides]
        levels = list(zip(dims, windows, strict=True))
        deeper = [*dims[1:], dims[-1]]
        self.inputs = nn.ModuleList(grid_conv(2, in_chans, width, 3, padding=1) for width in dims)
        self.fuses = nn.ModuleList(CrossGating(d, d, d, w, w, upsample=False) for d, w in levels if not first)
        self.encoders = nn.ModuleList(
            Level(width + below, width, side, groups)
            for width, below, side in zip(dims, [dims[0], *dims[:-1]], sides, strict=True))
        self.crosses = nn.ModuleList(CrossGating(d, d, d, w, w, upsample=False) for d, w in levels if not first)
        self.downs = nn.ModuleList(grid_conv(2, width, width, 4, stride=2, padding=1) for width in dims)
        self.bottlenecks = nn.ModuleList(
            Level(dims[-1], dims[-1], 8, groups, convolve=False) for _ in range(bottlenecks))

        def resized() -> nn.ModuleList:
            """[level][of the level], each map brought to a level's size and width."""
            return nn.ModuleList(Joined(Resized(other, width, j - i) for j, other in enumerate(dims))
                                 for i, width in enumerate(dims))

        self.encoded, self.skipped = resized(), resized()
        self.gates = nn.ModuleList(
            CrossGating(depth * width, below, width, w, w) for (width, w), below in zip(levels, deeper, strict=True))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(below, width, 2, 2) for width, below in zip(dims, deeper, strict=True))
        self.decoders = nn.ModuleList(
            Level((depth + 1) * width, width, side, groups) for width, side in zip(dims, sides, strict=True))
        self.outputs = nn.ModuleList(
            grid_conv(2, width, in_chans, 3, padding=1) if last else SupervisedAttention(width, in_chans)
            for width in dims)

    def forward(
        self, images: list[Tensor], before: tuple[list[Tensor], list[Tensor], list[Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        scales = [layer(image) for layer, image in zip(self.inputs, images, strict=True)]
        if before is not None:
            scales = [fuse(x, y)[0] for fuse, x, y in zip(self.fuses, scales, before[0], strict=True)]
        x, encoded = scales[0], []
        for level, (encoder, down) in enumerate(zip(self.encoders, self.downs, strict=True)):
            x = encoder(torch.cat([x, scales[level]], -1))
            if before is not None:
                x = self.crosses[level](x, before[1][level] + before[2][level])[0]
            encoded.append(x)
            x = down(x)
        for bottleneck in self.bottlenecks:
            x = bottleneck(x)
        count = len(encoded)
        gate, skips, decoded, features, pictures = x, list(encoded), list(encoded), list(encoded), list(images)
        for level in reversed(range(count)):
            signal = self.encoded[level](encoded, finest_first=True)
            skips[level], gate = self.gates[level](signal, gate)
        for level in reversed(range(count)):
            signal = self.skipped[level](skips, finest_first=False)
            x = decoded[level] = self.decoders[level](torch.cat([on_grid(self.ups[level], x), signal], -1))
            output = self.outputs[level]
            if isinstance(output, SupervisedAttention):
                features[level], pictures[level] = output(x, images[level])
            else:
                pictures[level] = output(x) + images[level]
        return pictures, features, encoded, decoded


class Maxim(nn.Module):
    """A picture restored: (B, C, H, W) in [0, 1] -> (B, C, H, W)."""

    scale = 1
    multiple = 64  # to which the sides of a picture are reflected

    def __init__(
        self, dim: int, num_stages: int, depth: int = 3, groups: int = 2, bottlenecks: int = 2, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.in_chans, self.depth = in_chans, depth
        self.unets = nn.ModuleList(
            UNet(dim, depth, groups, bottlenecks, in_chans, number == 0, number == num_stages - 1)
            for number in range(num_stages))

    def stages(self, image: Tensor) -> list[list[Tensor]]:
        """All supervised pictures [stage][scale, the coarsest first], each (B, C, H / 2^i, W / 2^i), rounded up."""
        height, width = image.shape[2:]
        whole = reflected(image, self.multiple).movedim(1, -1)
        images = [whole[:, (1 << i) // 2::1 << i, (1 << i) // 2::1 << i].contiguous() for i in range(self.depth)]
        before, results = None, []
        for unet in self.unets:
            pictures, *before = unet(images, before)
            results.append([pictures[i].movedim(-1, 1)[:, :, :-(-height >> i), :-(-width >> i)].contiguous()
                            for i in reversed(range(self.depth))])
        return results

    def forward(self, image: Tensor) -> Tensor:
        return self.stages(image)[-1][-1]


SIZES: dict[str, dict[str, Any]] = {  # the authors' S-1 to M-3
    f"maxim_{letter}{number}": dict(dim=dim, num_stages=number)
    for letter, dim in (("s", 32), ("m", 64)) for number in (1, 2, 3)
}


def maxim(dim: int, num_stages: int, depth: int = 3, in_chans: int = 3) -> Maxim:
    """A MAXIM of a size."""
    return Maxim(dim, num_stages, depth, in_chans=in_chans)


GMLP: KeyMap = (
    (r"LayerNorm_in\.gamma", "norm.weight"), (r"LayerNorm_in\.beta", "norm.bias"),
    (r"in_project\.(.*)", r"fc1.\1"), (r"out_project\.(.*)", r"fc2.\1"),
    *(rule for theirs, ours in (("Grid", "whole"), ("Block", "local")) for rule in (
        (rf"{theirs}GmlpLayer\.LayerNorm\.gamma", f"{ours}.norm.weight"),
        (rf"{theirs}GmlpLayer\.LayerNorm\.beta", f"{ours}.norm.bias"),
        (rf"{theirs}GmlpLayer\.in_project\.(.*)", rf"{ours}.fc1.\1"),
        (rf"{theirs}GmlpLayer\.out_project\.(.*)", rf"{ours}.fc2.\1"),
        (rf"{theirs}GmlpLayer\.{theirs}GatingUnit\.Dense_0\.(.*)", rf"{ours}.mix.\1"),
        (rf"{theirs}GmlpLayer\.{theirs}GatingUnit\.intermediate_layernorm\.gamma", f"{ours}.gate_norm.weight"),
        (rf"{theirs}GmlpLayer\.{theirs}GatingUnit\.intermediate_layernorm\.beta", f"{ours}.gate_norm.bias"))),
)
CROSS: KeyMap = (
    (r"ConvTranspose_0\.(.*)", r"up.\1"),
    (r"Conv_0\.(.*)", r"x_in.\1", pointwise), (r"Conv_1\.(.*)", r"y_in.\1", pointwise),
    (r"LayerNorm_([xy])\.gamma", r"\1_norm.weight"), (r"LayerNorm_([xy])\.beta", r"\1_norm.bias"),
    (r"in_project_([xy])\.(.*)", r"\1_fc.\2"), (r"out_project_([xy])\.(.*)", r"\1_out.\2"),
    *(rule for axis in "xy" for rule in (
        (rf"SplitHeadMultiAxisGating_{axis}\.LayerNorm_in\.gamma", f"{axis}_gate.norm.weight"),
        (rf"SplitHeadMultiAxisGating_{axis}\.LayerNorm_in\.beta", f"{axis}_gate.norm.bias"),
        (rf"SplitHeadMultiAxisGating_{axis}\.in_project\.(.*)", rf"{axis}_gate.fc1.\1"),
        (rf"SplitHeadMultiAxisGating_{axis}\.out_project\.(.*)", rf"{axis}_gate.fc2.\1"),
        (rf"SplitHeadMultiAxisGating_{axis}\.Dense_0\.(.*)", rf"{axis}_gate.whole.\1"),
        (rf"SplitHeadMultiAxisGating_{axis}\.Dense_1\.(.*)", rf"{axis}_gate.local.\1"))),
)


def authors(depth: int, stages: int) -> KeyMap:
    """The authors' names: resizing layers are numbered through all stages, in the order in which they are called."""
    rules: list[Any] = [
        Dropped(r"stage_0_encoder_block_\d\.cross_gating_block\..*", "the first stage has none before it"),
        Dropped(r".*decoder_block_\d\.UNetEncoderBlock_0\.(cross_gating_block|Conv_1)\..*", "decoders have neither"),
        Dropped(r".*input_catconv_\d\..*", "cross gating stands in its place"),
        Dropped(r".*(cross_gating_block|input_fuse_sam_\d)\.ConvTranspose_0\..*", "both maps have one size"),
    ]
    number = 0
    for stage in range(stages):
        for what in ("encoded", "skipped"):
            for level in reversed(range(depth)):
                for other in range(depth) if what == "encoded" else reversed(range(depth)):
                    rules.append((rf"UpSampleRatio_{number}\.Conv_0\.(.*)", rf"unets.{stage}.{what}.{level}.{other}.\1",
                                  pointwise))
                    number += 1
    unet = r"stage_(\d)_"
    for theirs, ours in (
        (unet + r"encoder_block_(\d)\.", r"unets.\1.encoders.\2."),
        (unet + r"decoder_block_(\d)\.UNetEncoderBlock_0\.", r"unets.\1.decoders.\2."),
        (unet + r"global_block_(\d)\.", r"unets.\1.bottlenecks.\2."),
    ):
        attention, inner = theirs + r"channel_attention_block_1_?(\d)\.", ours + r"attentions.\3."
        rules += [
            *within(GMLP, theirs + r"SplitHeadMultiAxisGmlpLayer_(\d)\.", ours + r"mixers.\3."),
            (theirs + r"(?:Conv_0|input_proj)\.(.*)", ours + r"fc.\3", pointwise),
            (theirs + r"Conv_1\.(.*)", r"unets.\1.downs.\2.\3"),
            (attention + r"LayerNorm\.gamma", inner + "norm.weight"),
            (attention + r"LayerNorm\.beta", inner + "norm.bias"),
            (attention + r"conv1\.(.*)", inner + r"inner.0.\4"), (attention + r"conv2\.(.*)", inner + r"inner.2.\4"),
            (attention + r"channel_mixing\.Dense_0\.(.*)", inner + r"inner.fc1.\4"),
            (attention + r"channel_mixing\.Dense_1\.(.*)", inner + r"inner.fc2.\4"),
            (attention + r"channel_attention\.Conv_0\.(.*)", inner + r"squeeze.fc1.\4", pointwise),
            (attention + r"channel_attention\.Conv_1\.(.*)", inner + r"squeeze.fc2.\4", pointwise),
        ]
    rules += [
        *within(CROSS, unet + r"encoder_block_(\d)\.cross_gating_block\.", r"unets.\1.crosses.\2."),
        *within(CROSS, unet + r"cross_gating_block_(\d)\.", r"unets.\1.gates.\2."),
        *within(CROSS, unet + r"input_fuse_sam_(\d)\.", r"unets.\1.fuses.\2."),
        (unet + r"input_conv_(\d)\.(.*)", r"unets.\1.inputs.\2.\3"),
        (unet + r"output_conv_(\d)\.(.*)", r"unets.\1.outputs.\2.\3"),
        (unet + r"decoder_block_(\d)\.ConvTranspose_0\.(.*)", r"unets.\1.ups.\2.\3"),
        *((unet + rf"supervised_attention_module_(\d)\.Conv_{place}\.(.*)", rf"unets.\1.outputs.\2.{name}.\3")
          for place, name in enumerate(("features", "picture", "attention"))),
    ]
    return rules


AUTHORS: KeyMap = authors(depth=3, stages=3)  # as the PyTorch port has them
FLAX: KeyMap = flax([rule for rule in AUTHORS if not isinstance(rule, Dropped)])  # JAX never makes the dead parameters
TAPS = {r"s(\d)_enc(\d)": r"unets.\1.downs.\2", r"s(\d)_bottleneck(\d)": r"unets.\1.bottlenecks.\2"}
