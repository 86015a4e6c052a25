"""RaftMLP: token MLPs that mix a column, then a row, of small rafts of channels together.

MLP-Mixer mixes all H W tokens at once, with weights that grow as (H W)^2. Here an MLP mixes the H tokens of each
column, another the W tokens of each row, and r channels, C / r apart, float together: a vector of r H (r W) numbers,
    x += MLP_vertical(norm(x));   x += MLP_horizontal(norm(x));   x += MLP_channels(norm(x)).
Patches are taken at several scales around the same centres and joined by one linear layer.

Tatsunami, Taki, "RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?", 2022, section 3.

Any grid: a map whose size is not the native one is resized (bicubic) to it before tokens mix and back after it; an
image whose sides are no multiples of the patch is first resized up to one, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.sizes import ceil_div
from saccade.parts.block import Block
from saccade.parts.mlp import Mlp
from saccade.parts.position import resample
from saccade.parts.pyramid import Pyramid

CARD = Card(
    "RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?",
    authors="Tatsunami, Taki",
    year=2022,
    systems=("raftmlp",),
    arxiv="2108.04384",
    code="okojoalg/raft-mlp@6060d5d",
    licence="Apache-2.0",
    read="paper, code",
    keywords="raft-token-mixing, vertical and horizontal token MLP, multi-scale patch embedding, attention-free",
    kinds=("backbone", "mixer"),
    mixers={"raft_token_mixing": "RaftMixing"},
    params={"raftmlp_s": 9.9e6, "raftmlp_m": 21.4e6, "raftmlp_l": 36.2e6},
    macs={"raftmlp_s": 2.1e9, "raftmlp_m": 4.3e9, "raftmlp_l": 6.5e9},
    top1={"raftmlp_s": 76.1, "raftmlp_m": 78.8, "raftmlp_l": 79.4},
    goldens=("raftmlp_s", "op_raft_token_mixing", "op_raft_token_mixing_resized"),
)


class RaftMixing(nn.Module):
    """What an MLP along each axis, over rafts of `raft` channels, adds to the map: (B, *grid, C) -> (B, *grid, C).

        y = x;   y += MLP_axis(norm_axis(y)), first axis first;   out = y - x.
    Its weights belong to the native grid: another map is resized to it, mixed, and resized back. Raises SaccadeError
    where the rafts do not divide the width. (Tatsunami and Taki, 2022, equations 3-6.)
    """

    ranks = (1, 2, 3)
    template = Template(
        "w[i, j] along each axis, over groups of channels", "layer norm before", "sum of x, twice, with gelu between"
    )

    def __init__(self, site: Site, raft: int = 2, ratio: float = 2.0) -> None:
        super().__init__()
        if site.dim % raft:
            raise SaccadeError(f"rafts of {raft} do not divide {site.dim} channels; choose a divisor")
        self.grid, self.raft = site.grid, raft
        self.norms = nn.ModuleList(nn.LayerNorm(site.dim) for _ in site.grid)
        self.mlps = nn.ModuleList(Mlp(raft * side, ratio) for side in site.grid)

    def forward(self, x: Tensor) -> Tensor:
        y = resample(x, self.grid)
        for axis, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True), start=1):
            rafts = norm(y).unflatten(-1, (self.raft, -1)).movedim((axis, -2), (-1, -2))  # (B, ..., C / r, r, S)
            mixed = mlp(rafts.flatten(-2)).unflatten(-1, (self.raft, -1))
            y = y + mixed.movedim((-1, -2), (axis, -2)).flatten(-2)
        return (resample(y, tuple(x.shape[1:-1])) - x).contiguous()

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds on the native grid of N tokens: 2 ratio N C r S for each axis of side S."""
        return 2 * torch.Size(self.grid).numel() * site.dim * sum(mlp.fc1.out_features for mlp in self._mlps())

    def _mlps(self) -> list[Mlp]:
        return [mlp for mlp in self.mlps if isinstance(mlp, Mlp)]

    def reach(self, site: Site) -> None:
        """Every token reaches every other, by way of the token where their lines cross."""
        return None


class RaftBlock(Block):
    """x += mixer(x); x += mlp(norm(x)): raft mixing norms its axes itself, another mixer gets norm(x)."""

    def __init__(self, site: Site, mixer: nn.Module, drop_path: float = 0.0, ratio: float = 4.0) -> None:
        super().__init__(site, mixer, drop_path=drop_path, norm=nn.LayerNorm, mlp=partial(Mlp, ratio=ratio))
        if isinstance(mixer, RaftMixing):
            self.norm1 = nn.Identity()


class MultiScaleEmbed(nn.Module):
    """One linear layer on patches of several sides around the same centres: (B, *grid, C) -> (B, *grid / patch, out).

    It is a sum of convolutions, a kernel a scale, all with the stride of the smallest.
    """

    def __init__(self, dim: int, out_dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.patch = min(kernels)
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, out_dim, kernel, self.patch, (kernel - self.patch) // 2, bias=number == 0)
            for number, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        image = whole_patches(x.movedim(-1, 1), self.patch)
        first, *others = self.convs
        out = first(image)
        for conv in others:
            out = out + conv(image)
        return out.movedim(1, -1).contiguous()


def whole_patches(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) resized (bicubic) up to whole patches."""
    size = [ceil_div(side, patch) * patch for side in image.shape[2:]]
    if all(isinstance(side, int) for side in size) and list(image.shape[2:]) == size:
        return image
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False)


class Stem(MultiScaleEmbed):
    """The embedding of an image (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1))


_KERNELS = ((4, 8), (2, 4), (2, 4), (2,))
SIZES: dict[str, dict[str, Any]] = {
    "raftmlp_s": dict(dims=(64, 128, 256, 512), depths=(2, 2, 6, 2)),
    "raftmlp_m": dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2)),
    "raftmlp_l": dict(dims=(128, 192, 512, 1024), depths=(2, 2, 6, 2)),
    "raftmlp_nano": dict(dims=(32, 64, 128), depths=(1, 1, 1), kernels=((2, 4), (2, 4), (2,)), img_size=32),
}


def raftmlp(
    dims: Sequence[int],
    depths: Sequence[int],
    kernels: Sequence[Sequence[int]] = _KERNELS,
    raft: int = 2,
    token_ratio: float = 2.0,
    channel_ratio: float = 4.0,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A RaftMLP of a size."""

    def stem(rank: int, in_chans: int, dim: int) -> Stem:
        if rank != 2:
            raise SaccadeError(f"img_size has {rank} sides: RaftMLP's patches are made for images; give two sides")
        return Stem(in_chans, dim, kernels[0])

    lowers = [lambda rank, dim, out, scales=scales: MultiScaleEmbed(dim, out, scales) for scales in kernels[1:]]
    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims], stem=stem, stride=min(kernels[0]),
        downsample=lowers, block=partial(RaftBlock, ratio=channel_ratio),
        mixer=partial(RaftMixing, raft=raft, ratio=token_ratio), norm=nn.LayerNorm, replace=mixer, **common,
    )


def embed_names(kernels: Sequence[int]) -> KeyMap:
    """The authors' names of an embedding: one matrix for all scales."""

    def scales(weight: Tensor) -> list[Tensor]:
        dim = weight.shape[1] // sum(kernel**2 for kernel in kernels)
        parts = weight.split([dim * kernel**2 for kernel in kernels], 1)
        return [part.unflatten(1, (dim, kernel, kernel)) for part, kernel in zip(parts, kernels, strict=True)]

    return (
        (r"fn\.0\.fc\.weight", tuple(f"convs.{number}.weight" for number in range(len(kernels))), scales),
        (r"fn\.0\.fc\.bias", "convs.0.bias"),
    )


def block_names(raft: int = 2) -> KeyMap:
    """The authors' names of a level's blocks.

    Their norms before token mixing count channels with the raft as the fast index, their maps as the slow one.
    """

    def slow(value: Tensor) -> Tensor:
        return value.unflatten(0, (-1, raft)).T.flatten()

    rules: list[Any] = []
    for block in range(20):  # more than any has
        theirs, ours = rf"fn\.{block + 2}\.", f"blocks.{block}."
        for axis in range(2):
            rules += [(theirs + rf"{2 * axis + 1}\.norm\.1\.(.*)", ours + rf"mixer.norms.{axis}.\1", slow),
                      (theirs + rf"{2 * axis + 1}\.fn\.0\.(.*)", ours + rf"mixer.mlps.{axis}.fc1.\1"),
                      (theirs + rf"{2 * axis + 1}\.fn\.3\.(.*)", ours + rf"mixer.mlps.{axis}.fc2.\1")]
        rules += [(theirs + r"5\.norm\.(.*)", ours + r"norm2.\1"), (theirs + r"5\.fn\.0\.(.*)", ours + r"mlp.fc1.\1"),
                  (theirs + r"5\.fn\.3\.(.*)", ours + r"mlp.fc2.\1")]
    return rules


AUTHORS: KeyMap = (
    *within(embed_names(_KERNELS[0]), r"levels\.0\.", "stem."),
    *(rule for stage in (1, 2, 3)
      for rule in within(embed_names(_KERNELS[stage]), rf"levels\.{stage}\.", f"stages.{stage}.downsample.")),
    *(rule for stage in range(4) for rule in within(block_names(), rf"levels\.{stage}\.", f"stages.{stage}.")),
    (r"heads\.0\.1\.(.*)", r"norm.\1"),
    (r"classifier\.(.*)", r"head.fc.\1"),
)
TAPS = {r"level(\d)": r"stages.\1"}
