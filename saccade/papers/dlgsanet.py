"""DLGSANet: kernels that every pixel makes for itself, and channels that look only at the channels like them.

Blocks of two kinds take turns. Dynamic local attention gives each pixel its own depthwise kernel, made from what is
around it and shared by the channels of a head,
    y_c(p) = sum over offsets o of w_head(c)(p)[o] x_c(p + o),   w(p) = W_2 dw(W_1 x)(p).
Sparse global attention has a ReLU where attention has a softmax, so that channels that do not match get no weight,
    relu(t q k^T) v,   q, k, v (channels, pixels), q and k of unit length.

Li, Xiang, Pan, "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution",
2023, section 3.

Any picture. Quirk kept: evaluation attends inside tiles of 48 pixels (`tile`), as large as the pictures of training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.ops.window import pad_ends
from saccade.parts.convolution import depthwise
from saccade.parts.restoration.body import Group, Restorer, same_conv
from saccade.parts.restoration.transposed import GATED, TRANSPOSED, GatedConvolution, TransposedAttention

CARD = Card(
    "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution",
    authors="Li, Xiang, Pan",
    year=2023,
    systems=("dlgsanet",),
    arxiv="2301.02031",
    code="NeonLeexiang/DLGSANet@0974b9a",
    licence="unknown",
    read="paper",
    keywords="super-resolution, dynamic local self-attention, sparse global self-attention, dynamic convolution",
    kinds=("restoration",),
    params={"dlgsanet_tiny_x4": 581e3, "dlgsanet_light_x4": 761e3, "dlgsanet_x4": 4.76e6},
    weights={  # one folder; the lightweight ones were trained anew after the paper
        f"dlgsanet_{size}_x{scale}": Weights(
            f"https://drive.google.com/drive/folders/1jbh5hNP4AGhsMPabWG7yq1mIDa_FcriO?usp=drive_link#{size}_x{scale}",
            data="DIV2K")
        for size in ("tiny", "light") for scale in (2, 3, 4)
    } | {"dlgsanet_x4": Weights(
        "https://drive.google.com/drive/folders/1kqjoO7IEi7QmaOSEH37xKjRA_LcmL2eU?usp=sharing", data="DIV2K")},
    goldens=("dlgsanet_tiny_x4", "op_dlgsanet_idynamic_dwconv", "op_dlgsanet_sparse_gsa",
             "op_dlgsanet_sparse_gsa_tlc"),
    tests=("tests/papers/test_dlgsanet.py",),
)


class DynamicConvolution(nn.Module):
    """A depthwise convolution with kernels that each pixel makes, one for `shared` channels: (B, H, W, C) -> the same.

    The map is zero-padded.
    """

    def __init__(self, dim: int, kernel: int = 7, shared: int = 6) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, dim // shared
        self.squeeze, self.around = nn.Linear(dim, dim // 4), depthwise(2, dim // 4, kernel)
        self.kernels = nn.Linear(dim // 4, kernel**2 * self.groups)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        kernels = self.kernels(self.around(self.squeeze(x))).unflatten(-1, (self.groups, self.kernel**2, 1))
        wide = pad_ends(x, [(self.kernel // 2,) * 2] * 2).unflatten(-1, (self.groups, -1))
        out = torch.zeros_like(x).unflatten(-1, (self.groups, -1))
        for place in range(self.kernel**2):  # one offset at a time: the neighbourhoods of all pixels are 49 maps
            top, left = divmod(place, self.kernel)
            out = torch.addcmul(out, kernels[..., place, :], wide[:, top:top + H, left:left + W])
        return out.flatten(-2)


class DynamicLocal(nn.Module):
    """proj(dynamic(value(x))): (B, H, W, C) -> the same."""

    def __init__(self, dim: int, kernel: int, heads: int) -> None:
        super().__init__()
        self.value, self.proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.dynamic = DynamicConvolution(dim, kernel, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dynamic(self.value(x)))


class HybridBlock(nn.Module):
    """x += mixer(norm(x)); x += gated convolution(norm(x))."""

    def __init__(self, dim: int, mixer: nn.Module, ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer, self.mlp = mixer, GatedConvolution(dim, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DLGSANet(Restorer):
    """pixels(stem(image) + conv(groups(stem(image)))): one convolution makes all pixels of the larger picture."""

    def __init__(self, scale: int, dim: int, groups: list[nn.Module], in_chans: int) -> None:
        super().__init__(scale, in_chans, multiple=1)
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False)
        self.groups, self.conv = nn.Sequential(*groups), same_conv(dim, dim)
        self.up = nn.Sequential(nn.Conv2d(dim, in_chans * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def restore(self, image: Tensor) -> Tensor:
        shallow = self.stem(image)
        deep = self.conv(self.groups(shallow.movedim(1, -1))).movedim(-1, 1)
        return self.up(deep + shallow)


_WIDTHS: dict[str, dict[str, Any]] = {
    "dlgsanet_tiny": dict(dim=48, groups=3, depth=3),
    "dlgsanet_light": dict(dim=48, groups=4, depth=3),
    "dlgsanet": dict(dim=90, groups=6, depth=4),
}
SIZES: dict[str, dict[str, Any]] = {
    f"{name}_x{scale}": dict(scale=scale, **width) for name, width in _WIDTHS.items() for scale in (2, 3, 4)
}


def dlgsanet(
    scale: int,
    dim: int,
    groups: int,
    depth: int,
    kernel: int = 7,
    shared: int = 6,
    heads: int = 6,
    local_ratio: float = 2.0,
    global_ratio: float = 2.0,
    tile: int | None = 48,
    in_chans: int = 3,
) -> DLGSANet:
    """A DLGSANet of so many groups with `depth` pairs of blocks each."""
    def pair() -> list[nn.Module]:
        return [HybridBlock(dim, DynamicLocal(dim, kernel, shared), local_ratio),
                HybridBlock(dim, TransposedAttention(dim, heads, f=torch.relu, tile=tile), global_ratio)]

    body: list[nn.Module] = [Group([block for _ in range(depth) for block in pair()], dim) for _ in range(groups)]
    return DLGSANet(scale, dim, body, in_chans)


DYNAMIC: KeyMap = (
    (r"conv1\.0\.weight", "squeeze.weight", matrix_from_1x1),
    (r"conv1\.0\.bias", "squeeze.bias"),
    (r"conv1\.1\.(.*)", r"around.\1"),
    (r"conv2\.0\.weight", "kernels.weight", matrix_from_1x1),
    (r"conv2\.0\.bias", "kernels.bias"),
)
BLOCK: KeyMap = (
    (r"norm[13]\.body\.(.*)", r"norm1.\1"),
    (r"norm[24]\.body\.(.*)", r"norm2.\1"),
    (r"IDynamicDWConv\.conv0\.weight", "mixer.value.weight", matrix_from_1x1),
    (r"IDynamicDWConv\.conv1\.weight", "mixer.proj.weight", matrix_from_1x1),
    *within(DYNAMIC, r"IDynamicDWConv\.conv\.", "mixer.dynamic."),
    *within(TRANSPOSED, r"restormer_attn\.", "mixer."),
    *within(GATED, r"(?:IDynamic|restormer)_ffn\.", "mlp."),
)
AUTHORS: KeyMap = (
    (r"overlap_embed\.0\.proj\.(.*)", r"stem.\1"),
    *within(BLOCK, r"deep_feature_extraction\.(\d+)\.body\.(\d+)\.", r"groups.\1.blocks.\2."),
    (r"deep_feature_extraction\.(\d+)\.body\.\d+\.(weight|bias)", r"groups.\1.conv.\2"),
    (r"deep_feature_extraction\.\d+\.(weight|bias)", r"conv.\1"),
    (r"upsample\.(.*)", r"up.\1"),
)
TAPS = {r"group(\d+)": r"groups.\1"}
