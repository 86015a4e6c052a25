"""UniRepLKNet: a few very large depthwise kernels, trained beside small dilated ones, deployed as one.

A 13x13 depthwise convolution sees far at once, but learns small patterns badly. While training, small kernels of
growing dilation stand beside it, each with batch norm, and are summed,
    out = bn_0(conv_k(x)) + sum_b bn_b(conv_(k_b, dilated r_b)(x)).
A dilated kernel is a large sparse one, so all fold into a single k x k kernel with a bias (`reparameterize(model)`).
Blocks put squeeze-excite before the MLP and global response normalisation in it; depth is added with 3x3 kernels.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", 2024, section 3; Zhang et al., "Scaling Up Your
Kernels: Large Kernel Design in ConvNets towards Universal Representations", 2024, sections 3-4.

Any grid: convolutions pad with zeros. Other kinds of data enter as images (`as_image`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.block import LAYER_NORM, Scale, SingleBlock
from saccade.parts.convolution import depthwise, grid_conv
from saccade.parts.dilated import DILATED, DilatedBranches
from saccade.parts.head import Head
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import Gelu
from saccade.parts.norm import BatchNorm, GlobalResponse
from saccade.parts.pyramid import Pyramid
from saccade.parts.reparameterize import fold
from saccade.parts.squeeze import SqueezeExcite
from saccade.parts.stem import ConvStem

_PUBLISHED = tuple(f"unireplknet_{size}" for size in ("a", "f", "p", "n", "t", "s", "b", "l", "xl"))

_ADDRESS = "hf:DingXiaoH/UniRepLKNet/unireplknet_"
_FINETUNED = "ImageNet-22K, ImageNet-1K"

CARD = Card(
    "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image "
    "Recognition",
    authors="Ding, Zhang, Ge, Zhao, Song, Yue, Shan",
    year=2024,
    systems=("unireplknet", "large_kernel_guide"),
    arxiv="2311.15599",
    code="AILab-CVC/UniRepLKNet@b5677d8",
    licence="Apache-2.0",
    read="paper",
    keywords="large kernel, dilated reparam block, structural re-parameterization, global response normalization, "
             "effective receptive field, universal perception, audio, video, point cloud, time series",
    kinds=("backbone", "mixer"),
    mixers={"dilated_reparam": "DilatedReparam"},
    params=dict(zip(_PUBLISHED, (4.4e6, 6.2e6, 10.7e6, 18.3e6, 31e6, 56e6, 98e6, 218e6, 386e6), strict=True)),
    macs=dict(zip(_PUBLISHED[:6], (0.6e9, 0.9e9, 1.6e9, 2.8e9, 4.9e9, 9.1e9), strict=True)),
    top1=dict(zip(_PUBLISHED[:6], (77.0, 78.6, 80.2, 81.6, 83.2, 83.9), strict=True)),
    aliases={f"{name}_deploy": name for name in _PUBLISHED},  # the golden that also holds the deployed form's output
    weights={
        "unireplknet_a": Weights(_ADDRESS + "a_in1k_224_acc77.03.pth"),
        "unireplknet_f": Weights(_ADDRESS + "f_in1k_224_acc78.58.pth"),
        "unireplknet_p": Weights(_ADDRESS + "p_in1k_224_acc80.23.pth"),
        "unireplknet_n": Weights(_ADDRESS + "n_in1k_224_acc81.64.pth"),
        "unireplknet_t": Weights(_ADDRESS + "t_in1k_224_acc83.21.pth"),
        "unireplknet_s": Weights(_ADDRESS + "s_in1k_224_acc83.91.pth"),
        "unireplknet_b": Weights(_ADDRESS + "b_in22k_to_in1k_384_acc87.40.pth", data=_FINETUNED,
                                 img_size=384, crop=1.0, top1=87.4),
        "unireplknet_l": Weights(_ADDRESS + "l_in22k_to_in1k_384_acc87.88.pth", data=_FINETUNED,
                                 img_size=384, crop=1.0, top1=87.9),
        "unireplknet_xl": Weights(_ADDRESS + "xl_in22k_to_in1k_384_acc87.96.pth", data=_FINETUNED,
                                 img_size=384, crop=1.0, top1=88.0),
    },
    goldens=("unireplknet_a", "unireplknet_a_deploy", "op_dilated_reparam_k13", "op_dilated_reparam_k7",
             "op_unireplknet_block_k13"),
    tests=("tests/papers/test_unireplknet.py",),
)

# kernel: ((kernel, dilation) of each branch beside it)
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparam(DilatedBranches):
    """A large depthwise kernel beside the paper's branches for it; SaccadeError for a kernel that has none."""

    template = Template(
        "w[j - i], a number a channel and offset, of several dilations", "batch norm a branch", "sum of x"
    )

    def __init__(self, site: Site, kernel: int = 13) -> None:
        if kernel not in BRANCHES:
            raise SaccadeError(f"kernel={kernel}: dilated branches are known for {sorted(BRANCHES)}")
        super().__init__(site, kernel, BRANCHES[kernel])


class SmallKernel(nn.Module):
    """One depthwise convolution without bias: the blocks that add depth."""

    ranks = (1, 2, 3)

    def __init__(self, site: Site, kernel: int = 3) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = depthwise(site.rank, site.dim, kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def deployed(self) -> nn.Module:
        return self.conv

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return torch.Size(grid).numel() * site.dim * self.kernel**site.rank

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.kernel // 2,) * site.rank


class ResponseMlp(nn.Module):
    """bn(fc2(grn(gelu(fc1(se(x))))))."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.squeeze = SqueezeExcite(dim, dim // 4)
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.activation = Gelu()
        self.response = GlobalResponse(ratio * dim)
        self.out = nn.Sequential(nn.Linear(ratio * dim, dim, bias=False), BatchNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.response(self.activation(self.fc1(self.squeeze(x)))))


class LargeKernelBlock(SingleBlock):
    """x += tail(mlp(bn(mixer(x)))); deployed, the norms, layer scale and the response's bias are in its weights."""

    @torch.no_grad()
    def deployed(self) -> LargeKernelBlock:
        conv = self.mixer.deployed() if isinstance(self.mixer, (DilatedReparam, SmallKernel)) else None
        if conv is not None:
            fold(conv, self.norm)
            self.mixer, self.norm = conv, nn.Identity()
        mlp = cast(ResponseMlp, self.mlp)
        linear = cast(nn.Linear, mlp.out[0])
        fold(linear, mlp.out[1])
        linear.bias.add_(linear.weight @ cast(Tensor, mlp.response.beta))
        mlp.response.beta = None
        mlp.out[1] = nn.Identity()
        if isinstance(self.scale, nn.Sequential) and isinstance(self.scale[0], Scale):
            gamma = self.scale[0].gamma
            linear.weight.mul_(gamma[:, None])
            linear.bias.mul_(gamma)
            self.scale = nn.Identity()
        return self


_LARGE = ((3, 3, 3), (13, 13, 13), (13, 3, 3) * 9, (13, 13, 13))
_SMALL = ((3, 3), (13, 13), (13,) * 6, (13, 13))
_WIDTHS = dict(zip(_PUBLISHED, (40, 48, 64, 80, 80, 96, 128, 192, 256), strict=True))
SIZES: dict[str, dict[str, Any]] = {
    name: dict(dims=tuple(width * 2**stage for stage in range(4)), kernels=_LARGE) for name, width in _WIDTHS.items()
}
SIZES |= {name: SIZES[name] | dict(kernels=_SMALL) for name in _PUBLISHED[:3]}
SIZES["unireplknet_n"] |= dict(kernels=((3, 3), (13, 13), (13,) * 8, (13, 13)))
SIZES["unireplknet_t"] |= dict(kernels=((3, 3, 3), (13, 13, 13), (13, 3) * 9, (13, 13, 13)))
SIZES["unireplknet_nano"] = dict(dims=(32, 64, 128), kernels=((3,), (7, 3), (7, 7)), patch=2, img_size=32)


def unireplknet(
    dims: Sequence[int],
    kernels: Sequence[Sequence[int]],
    patch: int = 4,
    layer_scale: float | None = 1e-6,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A UniRepLKNet of a size; `kernels` are those of each block, stage by stage, dilated branches from 7 on."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        half = [grid_conv(rank, in_chans, dim // 2, 3, stride=2, padding=1), LAYER_NORM(dim // 2), Gelu()]
        halvings = half if patch == 4 else []
        before = dim // 2 if halvings else in_chans
        return ConvStem(*halvings, grid_conv(rank, before, dim, 3, stride=2, padding=1), LAYER_NORM(dim))

    def own(site: Site) -> nn.Module:
        kernel = kernels[site.stage][site.index]
        return DilatedReparam(site, kernel) if kernel >= 7 else SmallKernel(site, kernel)

    return Pyramid(
        dims, [len(stage) for stage in kernels], [max(dim // 32, 1) for dim in dims], stem=stem, stride=patch,
        downsample=partial(ConvMerging, norm=LAYER_NORM),
        block=partial(LargeKernelBlock, norm=BatchNorm, mlp=ResponseMlp, layer_scale=layer_scale), mixer=own,
        head=partial(Head, norm=LAYER_NORM), replace=mixer, **common,
    )


def as_image(x: Tensor, kind: str) -> Tensor:
    """Data of another kind as the image (B, C, H, W) that the same backbone takes (build it with `in_chans=C`).

    "audio": a spectrogram (B, T, F) is one channel. "video": frames (B, T, C, H, W) are tiled, as square as T allows.
    "points": features of points on three planes (B, 3, C, H, W) stand side by side. "series": embeddings (B, T, L, C)
    of T steps and L variables fold to a map of T x L. Raises SaccadeError for other kinds or axes.
    Source: Ding et al., UniRepLKNet, 2024, section 3.3; how planes are joined is not in the text, and ours.
    """
    axes = {"audio": 3, "video": 5, "points": 5, "series": 4}
    if kind not in axes or x.ndim != axes[kind]:
        raise SaccadeError(f"as_image: kind={kind!r} with {x.ndim} axes; kinds and their axes are {axes}")
    if kind == "audio":
        return x[:, None]
    if kind == "series":
        return x.permute(0, 3, 1, 2)
    frames = x.shape[1]
    rows = next(side for side in range(isqrt(frames), 0, -1) if frames % side == 0) if kind == "video" else 1
    tiles = x.unflatten(1, (rows, frames // rows))  # (B, rows, columns, C, H, W)
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


BLOCK: KeyMap = (
    *within(DILATED, r"dwconv\.", "mixer."),
    (r"dwconv\.(.*)", r"mixer.conv.\1"),
    ("gamma", "scale.0.gamma"),
    (r"se\.down\.weight", "mlp.squeeze.fc1.weight", matrix_from_1x1),
    (r"se\.up\.weight", "mlp.squeeze.fc2.weight", matrix_from_1x1),
    (r"se\.down\.bias", "mlp.squeeze.fc1.bias"),
    (r"se\.up\.bias", "mlp.squeeze.fc2.bias"),
    (r"pwconv1\.1\.(.*)", r"mlp.fc1.\1"),
    (r"act\.1\.(gamma|beta)", r"mlp.response.\1", torch.flatten),
    (r"pwconv2\.0\.(.*)", r"mlp.out.0.\1"),
    (r"pwconv2\.2\.(.*)", r"mlp.out.1.\1"),
    (r"(.*)", r"\1"),
)
AUTHORS: KeyMap = (
    (r"downsample_layers\.0\.(.*)", r"stem.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
    *within(BLOCK, r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"norm\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
TAPS = {r"stage(\d)": r"stages.\1"}
