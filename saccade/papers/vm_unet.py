"""VM-UNet: a U of state space blocks, for segmentation.

An encoder of VMamba's blocks (x += cross_scan(norm(x))) in four stages with patch merging between them, and a decoder
that mirrors it with patch expanding: a token becomes 2x2 tokens of half the width. What enters an encoder stage is
added to what enters the decoder stage of its grid,
    d_0 = stage(e_3),    d_{k+1} = stage(expand(d_k + entering e_{3-k})),    mask = conv1x1(expand4(d_3)),
a sigmoid where there is one class. Any other mixer can stand where the cross-scan does.

Ruan, Li, Xiang, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", 2024, section 3.

Any grid: images are zero-padded at their end to whole tokens of the deepest stage (32 pixels), masks cropped; the
authors' code takes such sizes alone. An image of one channel is repeated to three.
Quirks kept: skips are added, not joined; the stem's map is no skip; the encoder has no last norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer, mixer_factory
from saccade.core.card import Card
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, Rule, pointwise, within
from saccade.core.site import Site
from saccade.ops.window import crop
from saccade.parts.merging import PatchMerging
from saccade.parts.pyramid import Stage, check_sizes, drop_path_rates, undecayed
from saccade.parts.ssm import GRID_SCAN, MixerBlock
from saccade.parts.stem import PatchEmbed, pad_image

CARD = Card(
    "VM-UNet: Vision Mamba UNet for Medical Image Segmentation",
    authors="Ruan, Li, Xiang",
    year=2024,
    systems=("survey_ssm_medical",),
    arxiv="2402.02491",
    code="JCruan519/VM-UNet@43c495b",
    licence="Apache-2.0",
    read="paper, code",
    keywords="U-Net, medical image segmentation, state space model, patch expanding",
    kinds=("backbone",),
    params={"vm_unet_isic": 27.43e6},
    goldens=("vm_unet_isic", "op_patch_expand_2d"),
    tests=("tests/papers/test_vm_unet.py",),
)


class PatchExpand(nn.Module):
    """norm(shuffle(expand(x))): (B, *grid, C) -> (B, *times x grid, out), each token as a patch, row by row."""

    def __init__(self, rank: int, dim: int, out_dim: int, times: int = 2) -> None:
        super().__init__()
        self.times, self.rank = times, rank
        self.expand = nn.Linear(dim, times**rank * out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        rank = self.rank
        x = self.expand(x).unflatten(-1, (*[self.times] * rank, -1))
        x = x.permute(0, *(axis for step in range(1, rank + 1) for axis in (step, step + rank)), 2 * rank + 1)
        x = x.clone(memory_format=torch.contiguous_format)
        for axis in range(1, rank + 1):
            x = x.flatten(axis, axis + 1)
        return self.norm(x)


class VMUNet(Backbone):
    """Images (B, C, *size) in, masks (B, classes, *size) out: probabilities for one class, logits for more.

    `features` gives the encoder's maps. `replace` is the caller's mixer (see `create_model`).
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        decoder_depths: Sequence[int],
        *,
        patch: int = 4,
        states: int = 16,
        num_classes: int = 1,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 256,
        drop_path_rate: float = 0.0,
        replace: Any = None,
    ) -> None:
        super().__init__()
        size = check_sizes(num_classes, in_chans, img_size)
        rank, count = len(size), len(dims)
        self.in_chans, self.num_features, self.stride = in_chans, dims[0] // 4, patch * 2 ** (count - 1)
        build_mixer = choose_mixer(replace, mixer_factory("cross_scan", states=states))
        names: list[str] = []

        def blocks(part: str, number: int, depth: int, rates: list[float]) -> list[MixerBlock]:
            level = number if part == "encoder" else count - 1 - number
            step, made = patch * 2**level, []
            for index in range(depth):
                names.append(f"{part}.{number}.blocks.{index}")
                site = Site(dims[level], max(dims[level] // 32, 1), level, index, step,
                            tuple(-(-side // step) for side in size))
                made.append(MixerBlock(site, build_mixer(site, names[-1]), drop_path=rates.pop(0)))
            return made

        ahead, back = drop_path_rates(drop_path_rate, sum(depths)), drop_path_rates(drop_path_rate, sum(decoder_depths))
        back.reverse()
        self.stem = PatchEmbed(rank, in_chans, dims[0], stride=patch, norm=nn.LayerNorm)
        self.encoder = nn.ModuleList(
            Stage(PatchMerging(rank, dims[number - 1], dims[number]) if number else nn.Identity(),
                  blocks("encoder", number, depth, ahead)) for number, depth in enumerate(depths))
        self.decoder = nn.ModuleList(
            Stage(PatchExpand(rank, dims[-number], dims[-number - 1]) if number else nn.Identity(),
                  blocks("decoder", number, depth, back)) for number, depth in enumerate(decoder_depths))
        self.expand = PatchExpand(rank, dims[0], self.num_features, patch)
        check_patterns(replace, names)
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(
            dict(num_chs=dim, reduction=patch * 2**number, module=f"encoder.{number}")
            for number, dim in enumerate(dims)
        )
        self.default_out_indices = tuple(range(count))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.removed = () if num_classes else ("head",)

    def encode(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What enters each encoder stage's blocks, and what leaves them: grids (B, *grid_i, C_i)."""
        if image.shape[1] == 1 and self.in_chans > 1:
            image = image.expand(-1, self.in_chans, *image.shape[2:])
        entering, leaving, x = [], [], self.stem(pad_image(image, self.stride))
        for stage in self.encoder:
            entering.append(stage.downsample(x))  # type: ignore[operator]
            x = stage.blocks(entering[-1])  # type: ignore[operator]
            leaving.append(x)
        return entering, leaving

    def features(self, image: Tensor) -> list[Tensor]:
        """The encoder's maps (B, C_i, *grid_i), of the padded image, channels-last in memory."""
        return [x.movedim(-1, 1) for x in self.encode(image)[1]]

    def forward_features(self, image: Tensor) -> Tensor:
        """The decoder's last map, (B, C, *size)."""
        entering, leaving = self.encode(image)
        x = self.decoder[0](leaving[-1])
        for stage, skip in zip(self.decoder[1:], reversed(entering[1:]), strict=True):
            x = stage(x + skip)
        return crop(self.expand(x), tuple(image.shape[2:])).movedim(-1, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Masks from what `forward_features` gives."""
        masks = self.head(features.movedim(1, -1)).movedim(-1, 1)
        return masks.sigmoid() if self.num_classes == 1 else masks

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes, *size)."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: rates and skips of the scans."""
        return undecayed(self)


_WIDE = (96, 192, 384, 768)
SIZES: dict[str, dict[str, Any]] = {
    "vm_unet": dict(dims=_WIDE, depths=(2, 2, 9, 2), decoder_depths=(2, 9, 2, 2)),
    "vm_unet_isic": dict(dims=_WIDE, depths=(2, 2, 2, 2), decoder_depths=(2, 2, 2, 1)),
    "vm_unet_narrow": dict(dims=(16, 32, 64), depths=(1, 1, 1), decoder_depths=(1, 1, 1), patch=2, img_size=32),
}


def vm_unet(
    dims: Sequence[int], depths: Sequence[int], decoder_depths: Sequence[int], patch: int = 4, states: int = 16,
    mixer: Any = None, **common: Any,
) -> VMUNet:
    """A VM-UNet of a size."""
    return VMUNet(dims, depths, decoder_depths, patch=patch, states=states, replace=mixer, **common)


def _block(theirs: str, ours: str) -> list[Rule]:
    scan = (*GRID_SCAN, (r"(.*)", r"\1"))
    return [(theirs + r"ln_1\.(.*)", ours + r"norm.\3"),
            *within(scan, theirs + r"self_attention\.", ours + "mixer.")]


AUTHORS: KeyMap = (
    (r"vmunet\.patch_embed\.(.*)", r"stem.\1"),
    *_block(r"vmunet\.layers\.(\d+)\.blocks\.(\d+)\.", r"encoder.\1.blocks.\2."),
    *_block(r"vmunet\.layers_up\.(\d+)\.blocks\.(\d+)\.", r"decoder.\1.blocks.\2."),
    *((rf"vmunet\.layers\.{stage}\.downsample\.(.*)", rf"encoder.{stage + 1}.downsample.\1") for stage in range(3)),
    (r"vmunet\.layers_up\.(\d+)\.upsample\.(.*)", r"decoder.\1.downsample.\2"),
    (r"vmunet\.final_up\.(.*)", r"expand.\1"),
    (r"vmunet\.final_conv\.(.*)", r"head.\1", pointwise),
)
# The authors' encoder outputs are taken after the merging that follows.
TAPS = {f"down{stage}": f"encoder.{stage + 1}.downsample" for stage in range(3)} | {
    "down3": "encoder.3.blocks", r"up(\d)": r"decoder.\1"}
