"""What networks that restore pictures share: any size in, the mean taken out and put back, the way up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.parts.convolution import grid_conv

MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, red, green, blue


class Restorer(nn.Module):
    """A picture (B, C, H, W) in [0, 1] -> (B, C, scale H, scale W), of any size.

    Its sides are reflected at their end up to multiples of `multiple`, and the result is cropped. The mean colour is
    taken out first and put back last (of colour pictures; gray ones have none). `restore` is the network itself.
    """

    mean: Tensor

    def __init__(self, scale: int, in_chans: int, multiple: int, mean: Sequence[float] = MEAN) -> None:
        super().__init__()
        self.scale, self.in_chans, self.multiple = scale, in_chans, multiple
        colours = torch.tensor(mean if in_chans == len(mean) else [0.0] * in_chans)
        self.register_buffer("mean", colours.view(1, -1, 1, 1), persistent=False)

    def restore(self, image: Tensor) -> Tensor:
        """(B, C, H, W), whole multiples -> (B, C, scale H, scale W)."""
        raise NotImplementedError(f"{type(self).__name__} restores nothing")

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != self.in_chans:
            raise SaccadeError(f"{type(self).__name__} takes pictures (B, {self.in_chans}, H, W), not "
                               f"{tuple(image.shape)}")
        height, width = image.shape[2:]
        mean = self.mean.to(image)
        out = self.restore(reflected(image, self.multiple) - mean) + mean
        return out[..., :height * self.scale, :width * self.scale]


class Group(nn.Module):
    """x + conv(blocks(x)): (B, H, W, C) -> the same."""

    def __init__(self, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.blocks, self.conv = nn.Sequential(*blocks), same_conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x))


class SuperResolver(Restorer):
    """shallow = conv(image); last(up(before(conv(norm(groups(norm(shallow)))) + shallow))): groups on (B, H, W, C).

    (Liang et al., "SwinIR: Image Restoration Using Swin Transformer", 2021, section 3.1, and those that build on it.)
    """

    def __init__(self, scale: int, dim: int, groups: Sequence[nn.Module], multiple: int, in_chans: int = 3) -> None:
        super().__init__(scale, in_chans, multiple)
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1)
        self.stem_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.groups = nn.Sequential(*groups)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.before = nn.Sequential(nn.Conv2d(dim, 64, 3, padding=1), nn.LeakyReLU())
        self.up = upsampler(scale, 64)
        self.last = nn.Conv2d(64, in_chans, 3, padding=1)

    def restore(self, image: Tensor) -> Tensor:
        shallow = self.stem(image)
        deep = self.norm(self.groups(self.stem_norm(shallow.movedim(1, -1)))).movedim(-1, 1)
        return self.last(self.up(self.before(self.conv(deep) + shallow)))


# The names that SwinIR's heirs give what stands around the groups.
SKELETON: KeyMap = (
    (r"conv_first\.(.*)", r"stem.\1"),
    (r"patch_embed\.norm\.(.*)", r"stem_norm.\1"),
    (r"conv_after_body\.(.*)", r"conv.\1"),
    (r"conv_before_upsample\.(.*)", r"before.\1"),
    (r"upsample\.(.*)", r"up.\1"),
    (r"conv_last\.(.*)", r"last.\1"),
)


def reflected(image: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with each side reflected at its end, as often as needed, up to a whole multiple."""
    for axis in (2, 3):
        side = image.shape[axis]
        full = side + (-side) % multiple
        if full != side:
            period = max(2 * side - 2, 1)
            place = torch.arange(full, device=image.device) % period
            image = image.index_select(axis, torch.minimum(place, period - place) if side > 1 else place * 0)
    return image


def upsampler(scale: int, dim: int) -> nn.Sequential:
    """Convolutions and pixel shuffles on (B, C, H, W): doublings for 1, 2, 4, 8, a threefold step for 3."""
    steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    if scale < 1 or (scale != 3 and 2 ** len(steps) != scale):
        raise SaccadeError(f"scale={scale}: pictures grow by 1, 2, 3, 4 or 8")
    layers: list[nn.Module] = []
    for step in steps:
        layers += [nn.Conv2d(dim, dim * step**2, 3, padding=1), nn.PixelShuffle(step)]
    return nn.Sequential(*layers)


def same_conv(dim: int, out_dim: int) -> nn.Module:
    """A 3x3 convolution on grids (B, H, W, C)."""
    return grid_conv(2, dim, out_dim, 3, padding=1)
