"""What masked pre-training asks of a host: its maps, and its tokens where only those that are seen are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.site import Site
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.host import blocks_of, gathered
from saccade.parts.plain import Plain, TokenBlock
from saccade.parts.position import sincos
from saccade.parts.pyramid import Pyramid


def maps_of(model: Any, image: Tensor) -> list[Tensor]:
    """The maps (B, C_i, *grid_i) after each stage of a pyramid, ours or timm's, each of another stride."""
    if hasattr(model, "features"):
        maps = model.features(image)
        return [maps[number] for number in stages_of(model)]
    return list(model.forward_intermediates(image, indices=stages_of(model), intermediates_only=True))


def stages_of(model: Any) -> list[int]:
    """The numbers of a host's maps that make a pyramid: the last of each stride, without the map of timm's stems."""
    strides = [entry["reduction"] for entry in model.feature_info]
    least = 0 if hasattr(model, "features") else 4
    return [number for number, stride in enumerate(strides) if stride >= least and stride not in strides[number + 1:]]


def pyramid_of(model: Any, method: str) -> tuple[list[int], list[int]]:
    """Channels and strides of a host's maps; raises where the host is no pyramid whose strides double."""
    gives_maps = hasattr(model, "features") or hasattr(model, "forward_intermediates")
    info = [model.feature_info[number] for number in stages_of(model)] if hasattr(model, "feature_info") else []
    strides = [int(entry["reduction"]) for entry in info]
    if not gives_maps or len(strides) < 2 or any(2 * a != b for a, b in zip(strides, strides[1:], strict=False)):
        raise SaccadeError(f"{method} needs a pyramid with maps of doubling strides (ours or timm's ResNet, ConvNeXt); "
                           f"{type(model).__name__} has the strides {strides or 'none'}")
    return [int(entry["num_chs"]) for entry in info], strides


class Visible:
    """The tokens of a plain host, ours or timm's, of which its blocks are given some.

    `host` is a stack of softmax attention, which takes tokens as a set. Raises SaccadeError for any other.
    """

    def __init__(self, host: Any, method: str) -> None:
        self.host = host
        self.ours = isinstance(host, Plain)
        for number, block in enumerate(blocks_of(host, method)):
            if self.ours and not (type(block) is TokenBlock and type(block.mixer) is Attention
                                  and block.position is None):
                inside = type(getattr(block, "mixer", block)).__name__
                raise SaccadeError(f"{method} shows a host some of its tokens, without their grid, and blocks.{number} "
                                   f"of {type(host).__name__} mixes by {inside}: choose a ViT or DeiT")
        if not self.ours and not hasattr(host, "_pos_embed"):
            raise SaccadeError(f"{method} needs a plain vision transformer, ours or timm's; {type(host).__name__} is "
                               "none")

    @property
    def prefix(self) -> int:
        return int(self.host.prefix_count if self.ours else self.host.num_prefix_tokens)

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""
        if self.ours:
            return int(self.host.feature_info[0]["reduction"])
        return int(self.host.patch_embed.patch_size[0])

    @property
    def in_chans(self) -> int:
        return int(self.host.in_chans if self.ours else self.host.patch_embed.proj.in_channels)

    @property
    def dim(self) -> int:
        return int(self.host.num_features)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The sequence (B, P + N, C) that enters the first block, with its positions, and the grid of the N."""
        if self.ours:
            return self.host.tokens(image)
        grid = tuple(side // self.patch for side in image.shape[2:])
        return self.host.norm_pre(self.host._pos_embed(self.host.patch_embed(image))), grid

    def blocks(self, tokens: Tensor) -> Tensor:
        """What leaves the last block and the norm, for any subset of the tokens."""
        for block in self.host.blocks:
            tokens = block(tokens, self.prefix, ()) if self.ours else block(tokens)
        return self.host.norm(tokens)

    def __call__(self, image: Tensor, seen: Tensor) -> Tensor:
        """(B, P + M, C) of the M patches of each image whose numbers are `seen` (B, M); the rest is not computed."""
        tokens, _ = self.tokens(image)
        always = torch.arange(self.prefix, device=seen.device).expand(len(seen), -1)
        return self.blocks(gathered(tokens, torch.cat([always, seen + self.prefix], 1)))



class PatchDecoder(nn.Module):
    """A plain transformer that says something of every patch, from the tokens of those that were seen.

    Tokens (B, P + M, C) of M patches with the numbers `seen` (B, M) -> (B, N, dim): a learned token stands for each
    other patch of the grid, fixed sines and cosines say where it is. (He et al., "Masked Autoencoders Are Scalable
    Vision Learners", 2022, section 3.)
    """

    def __init__(self, in_dim: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.missing = nn.Parameter(torch.randn(dim) * 0.02)
        site = Site(dim, heads)
        self.blocks = nn.Sequential(*(Block(site, Attention(site)) for _ in range(depth)), LAYER_NORM(dim))

    def forward(self, tokens: Tensor, seen: Tensor, grid: tuple[int, ...]) -> Tensor:
        tokens = self.embed(tokens)
        prefix = tokens.shape[1] - seen.shape[1]
        whole = self.missing.to(tokens.dtype).expand(len(tokens), torch.Size(grid).numel(), -1)
        whole = whole.scatter(1, seen[..., None].expand(-1, -1, tokens.shape[-1]), tokens[:, prefix:])
        whole = whole + sincos(grid, tokens.shape[-1], device=tokens.device).flatten(0, -2).to(tokens.dtype)
        return self.blocks(torch.cat([tokens[:, :prefix], whole], 1))[:, prefix:]


def spread(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A mask (B, *coarse) at a finer grid, (B, *grid), each place repeated."""
    for axis, (coarse, fine) in enumerate(zip(mask.shape[1:], grid, strict=True), 1):
        if fine % coarse:
            raise SaccadeError(f"a map of {tuple(grid)} places does not lie on a mask of {tuple(mask.shape[1:])}: "
                               "give pictures whose sides are multiples of the last stride")
        mask = mask.repeat_interleave(fine // coarse, axis)
    return mask


class Covered:
    """A host whose embedded patches give way to a token (width,) where they are hidden.

    (B, C, *size), `hidden` (B, *coarse) bool, the token -> the last map (B, C', *grid). The host computes the whole
    picture, so that any will do whose stem gives tokens: Pyramids and Plains of ours, timm's ViT and Swin. Raises
    SaccadeError for any other.
    """

    def __init__(self, host: Any, method: str) -> None:
        self.ours = isinstance(host, (Pyramid, Plain)) and not isinstance(host.stem, (nn.ModuleDict, nn.ModuleList))
        if not (self.ours or hasattr(getattr(host, "patch_embed", None), "proj")):
            raise SaccadeError(f"{method} hides embedded patches, and {type(host).__name__} has no stem that gives "
                               "them: choose a Pyramid or Plain of ours, or timm's ViT or Swin")
        self.host = host
        strides = [int(entry["reduction"]) for entry in self.host.feature_info]
        self.first_stride, self.stride = strides[0], strides[-1]
        self.in_chans = int(self.host.in_chans if self.ours else self.host.patch_embed.proj.in_channels)
        self.dim = int(self.host.num_features)
        self.width = self._width()

    @torch.no_grad()
    def _width(self) -> int:
        if not self.ours:
            return int(self.host.patch_embed.proj.out_channels)
        rank = len(self.host.grid) if hasattr(self.host, "grid") else 2
        like = next(self.host.stem.parameters())
        return int(self.host.stem(like.new_zeros(1, self.in_chans, *[2 * self.stride] * rank)).shape[-1])

    def __call__(self, image: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
        def cover(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            grid = tuple(tokens.shape[1:-1])
            if tokens.ndim == 3 and image.ndim == 4:  # timm's ViT flattens them
                grid = tuple(side // self.first_stride for side in image.shape[2:])
            mask = spread(hidden, grid).view(*tokens.shape[:-1], 1)
            return torch.where(mask, token.to(tokens.dtype), tokens)

        # Stems of overlapping convolutions would see hidden pixels from beside them: these are blank.
        image = image.masked_fill(spread(hidden, tuple(image.shape[2:]))[:, None], 0.0)
        handle = (self.host.stem if self.ours else self.host.patch_embed).register_forward_hook(cover)
        try:
            found: Tensor = self.host.forward_features(image)
        finally:
            handle.remove()
        if isinstance(self.host, Pyramid):
            return found
        if found.ndim == 3:
            prefix = self.host.prefix_count if self.ours else self.host.num_prefix_tokens
            return found[:, prefix:].transpose(1, 2).unflatten(2, [-(-side // self.stride) for side in image.shape[2:]])
        return found.movedim(-1, 1)
