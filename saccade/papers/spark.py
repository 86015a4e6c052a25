"""SparK: BERT for convolutional networks. What is hidden is not zero, it is not there.

Six tenths of the patches of a picture are hidden. A convolution that read them as zeros would mistake them for black,
and let them wither the visible from layer to layer; here every map keeps the mask, and what looks at more than one
place reads visible places alone (as a sparse convolution over points would), a norm counts visible places alone. A
decoder in the shape of a U-Net takes the maps of all scales, each normed and filled with a mask token where nothing is,
    x_i = up(x_(i-1) + proj_i(fill(norm_i(map_i)))),   picture = proj(x_last),
    loss = mean over hidden patches of |picture - pixels|^2, pixels normalised a patch.

Tian, Jiang, Diao, Lin, Wang, Yuan, "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling", 2023, section 3.

A dense host runs as it is: the mask is laid on what each convolution, pooling or statistic reads, and nowhere else.
Wide layers of one place are given the visible places alone, which more than pays for the masks: a ResNet-50 takes nine
tenths of the dense network's time. The sides of a picture are multiples of the last stride. A host that mixes places by
something else (attention, squeezing, group norm) is refused: hidden places would be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.evaluation import evaluation
from saccade.core.keymap import Dropped, KeyMap
from saccade.parts.convolution import GRID_CONVOLUTIONS, AveragePool
from saccade.parts.masking import maps_of, pyramid_of, spread
from saccade.parts.norm import BatchNorm, GlobalResponse
from saccade.parts.pixels import check_ratio, denormalised, hidden_patches, image_of, normalised, patches_of

CARD = Card(
    "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling",
    authors="Tian, Jiang, Diao, Lin, Wang, Yuan",
    year=2023,
    systems=("spark",),
    arxiv="2301.03580",
    code="keyu-tian/SparK@a63e386",
    licence="MIT",
    read="paper",
    keywords="self-supervised learning, masked image modeling, sparse convolution, hierarchical decoder, convnet",
    kinds=("pretraining",),
    methods={"spark": "SparK"},
    goldens=("spark_resnet50", "op_spark_sparse_layers"),
    tests=("tests/papers/test_spark.py",),
)

WIDE = 128 * 512  # inputs times outputs of a layer: 0.90 of the dense ResNet-50's time on a CPU core, without it 1.10
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ON_GRID = (nn.Linear, *GRID_CONVOLUTIONS.values(), BatchNorm, AveragePool, GlobalResponse)  # channels last


def _pays(module: nn.Module) -> bool:
    """Whether it mixes no places and multiplies so much that picking the active ones costs less than all of them."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features >= WIDE
    return (isinstance(module, _CONVOLUTIONS) and max(module.kernel_size) == max(module.stride) == module.groups == 1
            and not any(module.padding) and module.in_channels * module.out_channels >= WIDE)


@contextmanager
def sparse(model: nn.Module, active: Tensor, noise: float = 0.0) -> Iterator[None]:
    """Within, `model` reads no place that is not `active` (B, *grid) bool, whatever stands there.

    Convolutions, poolings and global responses read zeros there, batch norms in training and wide layers of one place
    are given the active ones alone.
    What lies at the other places is not defined; `noise` puts noise there, so that a leak is seen.
    """
    masks: dict[tuple[int, ...], Tensor] = {}
    numbers: dict[tuple[int, ...], Tensor] = {}

    def at(grid: tuple[int, ...]) -> Tensor:
        if grid not in masks:
            masks[grid] = spread(active, grid)
        return masks[grid]

    def rows(grid: tuple[int, ...]) -> Tensor:
        """Numbers of the active places among all (B x grid)."""
        if grid not in numbers:
            numbers[grid] = at(grid).flatten().nonzero()[:, 0]
        return numbers[grid]

    def last(module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Channels last, (B, *grid, C), and the grid."""
        x = x if isinstance(module, _ON_GRID) else x.movedim(1, -1)
        return x, tuple(x.shape[1:-1])

    def mask_for(module: nn.Module, x: Tensor) -> Tensor:
        """(B, *grid, 1) or (B, 1, *grid)."""
        return at(tuple(x.shape[1:-1]))[..., None] if isinstance(module, _ON_GRID) else at(tuple(x.shape[2:]))[:, None]

    def hide(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0] * mask_for(module, inputs[0]), *inputs[1:]

    def disturb(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(mask_for(module, output), output, noise * torch.randn_like(output))

    def lies(grid: tuple[int, ...]) -> bool:
        """Whether a map of this grid is one of the picture's, not of something pooled from it."""
        coarse = active.shape[1:]
        return len(grid) == len(coarse) and not any(fine % one for fine, one in zip(grid, coarse, strict=True))

    def part(shapes: list[torch.Size | None]) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
        """Hooks that show a module the active places alone, in a row, and put what it gives back among zeros."""
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x, grid = last(module, inputs[0])
            shapes.append(x.shape[:-1] if lies(grid) else None)
            if shapes[-1] is None:
                return None
            seen = x.flatten(0, -2).index_select(0, rows(grid))
            seen = seen.view(1, -1, *[1] * (len(grid) - 1), x.shape[-1])
            return (seen if isinstance(module, _ON_GRID) else seen.movedim(-1, 1),)

        def after(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            shape, (seen, _) = shapes.pop(), last(module, output)
            if shape is None:
                return output
            blank = seen.new_zeros(shape.numel(), seen.shape[-1])
            whole = blank.index_copy(0, rows(tuple(shape[1:])), seen.flatten(0, -2)).view(*shape, -1)
            return whole if isinstance(module, _ON_GRID) else whole.movedim(-1, 1)

        return before, after

    handles = []
    for module in model.modules():
        wide = isinstance(module, _CONVOLUTIONS) and max(module.kernel_size) > 1
        if wide or isinstance(module, (*_POOLS, AveragePool, GlobalResponse)):
            handles.append(module.register_forward_pre_hook(hide))
        elif (isinstance(module, _NORMS) and module.training) or _pays(module):
            before, after = part([])
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        if noise and isinstance(module, _CONVOLUTIONS):
            handles.append(module.register_forward_hook(disturb))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class UpBlock(nn.Module):
    """norm(conv(relu6(norm(conv(x twice as large))))): (B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.norm2 = nn.Conv2d(dim, out_dim, 3, padding=1, bias=False), nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(nn.functional.relu6(self.norm1(self.conv1(self.up(x))))))


class Densify(nn.Module):
    """proj(norm(x) where active, a learned token elsewhere): a sparse map as the decoder takes it."""

    def __init__(self, dim: int, out_dim: int, kernel: int, norm: str) -> None:
        super().__init__()
        self.norm = BatchNorm(dim) if norm == "batch" else nn.LayerNorm(dim, eps=1e-6)
        self.missing = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.missing, std=0.02)
        alike = kernel == 1 and dim == out_dim
        self.proj = nn.Identity() if alike else nn.Conv2d(dim, out_dim, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        mask = spread(active, tuple(x.shape[2:]))
        rows = x.movedim(1, -1)
        if self.training:
            normed = torch.zeros_like(rows).index_put(mask.nonzero(as_tuple=True), self.norm(rows[mask]))
        else:
            normed = self.norm(rows)
        return self.proj(torch.where(mask[..., None], normed, self.missing).movedim(-1, 1))


class SparK(nn.Module):
    """Masked pre-training of a convolutional pyramid: images (B, C, H, W) -> {"loss"}.

    `model` is a pyramid, ours or timm's, `ratio` the share of patches hidden, `width` the decoder's channels at the
    last map, halved at each doubling. `norm` of the maps: "batch" or "layer", by default what the host has.
    """

    def __init__(self, model: nn.Module, ratio: float = 0.6, width: int = 512, norm: str | None = None) -> None:
        super().__init__()
        dims, strides = pyramid_of(model, "spark")
        self.model, self.ratio, self.stride = model, check_ratio("spark", ratio), strides[-1]
        doublings = self.stride.bit_length() - 1
        if width % 2**doublings:
            raise SaccadeError(f"width={width} cannot be halved {doublings} times: give a multiple of {2**doublings}")
        norms = any(isinstance(module, _NORMS) for module in model.modules())
        norm = norm or ("batch" if norms else "layer")
        widths = [width // 2**number for number in range(doublings + 1)]
        self.densify = nn.ModuleList(Densify(dim, widths[number], 3 if number else 1, norm)
                                     for number, dim in enumerate(reversed(dims)))
        self.decoder = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.in_chans = next(p.shape[1] for p in model.parameters() if p.ndim == 4)
        self.proj = nn.Conv2d(widths[-1], self.in_chans, 1)
        self._check_no_leak()

    @torch.no_grad()
    def _check_no_leak(self) -> None:
        like = next(self.model.parameters())
        image = torch.ones(1, self.in_chans, 3 * self.stride, 3 * self.stride, dtype=like.dtype, device=like.device)
        active = torch.zeros(1, 3, 3, dtype=torch.bool, device=like.device)
        active[:, 0, 0] = active[:, 1, 2] = True
        random = torch.random.fork_rng(devices=[like.device] if like.is_cuda else [])
        with evaluation(self.model), random, sparse(self.model, active, noise=3.0):
            first, second = (maps_of(self.model, image) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            seen = spread(active, tuple(one.shape[2:]))[:, None]
            if not torch.allclose(one * seen, other * seen, rtol=1e-3, atol=1e-4):
                raise SaccadeError(f"spark: hidden places leak into what is seen: {type(self.model).__name__} mixes "
                                   "places by more than convolutions and pooling; choose a convolutional pyramid")

    def maps(self, image: Tensor, active: Tensor) -> list[Tensor]:
        """The host's maps (B, C_i, H_i, W_i), zero where not active."""
        with sparse(self.model, active):
            return [x * spread(active, tuple(x.shape[2:]))[:, None] for x in maps_of(self.model, image)]

    def guess(self, image: Tensor, active: Tensor) -> Tensor:
        """The decoder's picture, patches normalised."""
        return self.decode(self.maps(image, active), active)

    def decode(self, maps: list[Tensor], active: Tensor) -> Tensor:
        x: Any = 0
        for number, block in enumerate(self.decoder):
            if number < len(self.densify):
                x = x + self.densify[number](maps[-1 - number], active)
            x = block(x)
        return self.proj(x)

    def errors(self, image: Tensor, guess: Tensor, active: Tensor) -> Tensor:
        """The mean over each picture's hidden patches, (B,)."""
        off = patches_of(guess, self.stride) - normalised(patches_of(image, self.stride))
        hidden = ~active.flatten(1)
        return (off.square().mean(-1) * hidden).sum(1) / hidden.sum(1).clamp(min=1)

    def draw(self, image: Tensor) -> Tensor:
        """Which patches are seen, (B, H / stride, W / stride) bool: as many in each picture."""
        return ~hidden_patches("spark", image, self.stride, self.ratio)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        active = self.draw(image)
        return {"loss": self.errors(image, self.guess(image, active), active).mean()}

    def reconstruct(self, image: Tensor, active: Tensor | None = None) -> Tensor:
        """The picture, its hidden patches (drawn if not given) replaced by what is guessed."""
        active = self.draw(image) if active is None else active
        return self.painted(image, self.guess(image, active), active)

    def painted(self, image: Tensor, guess: Tensor, active: Tensor) -> Tensor:
        """The guess at hidden patches, with the mean and spread of the true ones, the image elsewhere."""
        pixels = patches_of(image, self.stride)
        filled = denormalised(patches_of(guess, self.stride), pixels)
        whole = torch.where(active.flatten(1)[..., None], pixels, filled)
        return image_of(whole, self.stride, tuple(active.shape[1:]))


AUTHORS: KeyMap = (
    (r"sparse_encoder\.sp_cnn\.(.*)", r"model.\1"),
    (r"dense_decoder\.dec\.(\d+)\.up_sample\.(.*)", r"decoder.\1.up.\2"),
    *((rf"dense_decoder\.dec\.(\d+)\.conv\.{theirs}\.(.*)", rf"decoder.\1.{ours}.\2")
      for theirs, ours in enumerate(("conv1", "norm1", "", "conv2", "norm2")) if ours),
    (r"dense_decoder\.proj\.(.*)", r"proj.\1"),
    (r"densify_norms\.(\d+)\.(.*)", r"densify.\1.norm.\2"),
    (r"densify_projs\.(\d+)\.(.*)", r"densify.\1.proj.\2"),
    (r"mask_tokens\.(\d+)", r"densify.\1.missing", torch.flatten),
    Dropped(r"imn_[ms]|norm_black", "constants of the authors' pictures"),
)
