"""HyperZZW and Terminator: kernels as large as the map, made by one network and multiplied by what another sees.

A slow network, a product of sinusoids of the coordinates alone, makes a kernel W a channel; the activation Z itself
turns it into a context-dependent weight, by plain multiplication, that acts on the activation again:
    out = (Z * W) Z    (a matrix product over height and width), or conv_{W(Z)}(Z) with a local kernel.
Terminator has ten such branches a layer and no residual connection anywhere: a bottleneck keeps what is worth it.

Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024.

Any grid: coordinates span -1 to 1 over any map, planes are resampled (bicubic); where a map is not square the right
factor's rows are resampled (linearly) to as many as the left one has columns. The authors' code takes squares alone.
Quirks kept: norms use the batch's own statistics in evaluation too, and local kernels read the mean over the batch, so
images of a batch influence each other. Left out: a zero bias between blocks that no optimizer of the authors' sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.card import Card
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import Dropped, KeyMap, pointwise, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.head import Head, Pooling
from saccade.parts.position import is_native, resample
from saccade.parts.pyramid import check_sizes, drop_path_rates, undecayed
from saccade.parts.slow_net import ContextSlowNet, SlowNet

CARD = Card(
    "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
    authors="Zhang",
    year=2024,
    systems=("hyperzzw",),
    arxiv="2401.17948",
    code="lalalune/Terminator@67e773a (a fork)",
    licence="unknown",
    read="paper",
    keywords="hyper-kernel, implicit kernel, coordinate network, slow and fast weights, no residual, Terminator",
    kinds=("backbone", "mixer"),
    mixers={"hyper_zzw": "HyperZZW"},
    params={"terminator_cifar100": 1.3e6},
    goldens=("terminator_cifar100", "op_hyperzzw_global", "op_hyperzzw_local", "op_hyper_interact", "op_terminator_rgu",
             "op_g_ibs"),
    tests=("tests/papers/test_hyperzzw.py",),
)


def product(a: Tensor, y: Tensor) -> Tensor:
    """a y of each channel, matrices over height and width: (B, H, W, C) x (B, H, W, C) -> (B, H, W, C)."""
    square = (a.shape[2], a.shape[2])
    y = y if is_native(square, tuple(y.shape[1:3])) else resample(y, square, linear=True)
    return (a.movedim(-1, 1) @ y.movedim(-1, 1)).movedim(1, -1).contiguous()


def standardised(x: Tensor, together: Tensor | bool) -> Tensor:
    """(x - mean) / std of each channel of (B, H, W, C): over the batch where `together` (C,) holds, else an image."""
    mean = x.mean((1, 2), keepdim=True)
    apart = x - mean
    variance = apart.square().mean((1, 2), keepdim=True)  # many times as fast as var over axes that do not lie last
    beyond = mean - mean.mean(0, keepdim=True)
    whole = (variance + beyond.square()).mean(0, keepdim=True)
    chosen = torch.as_tensor(together, device=x.device)
    beyond, variance = torch.where(chosen, beyond, 0), torch.where(chosen, whole, variance)
    return (apart + beyond) * (variance + 1e-5).rsqrt()


class GroupStandardisation(nn.Module):
    """Channels in `groups`, standardised over the batch and over each image in turn: (B, H, W, C) -> same."""

    together: Tensor

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.register_buffer("together", torch.arange(dim) // max(dim // groups, 1) % 2 == 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return standardised(x, self.together)


class HyperZZW(nn.Module):
    """out = (x * W) x, W the slow network's kernel over the map: (B, H, W, C) -> (B, H, W, C)."""

    ranks = (2,)
    template = Template("w(i) of a network of the place, times x", "none", "convolution of x with it, times x")

    def __init__(self, site: Site, hidden: int = 64, layers: int = 2, omega: float = 10.0) -> None:
        super().__init__()
        self.slow = SlowNet(site.grid, site.dim, hidden, layers, omega)

    def forward(self, x: Tensor) -> Tensor:
        return product(x * self.slow(tuple(x.shape[1:-1])), x)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of the product: H W W C."""
        return grid[0] * grid[1] ** 2 * site.dim

    def shared_cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Those of the kernel."""
        return self.slow.cost(grid)

    def reach(self, site: Site) -> tuple[int, ...]:
        """The rows and columns that cross in a token, whole; two layers reach everything."""
        return tuple(side - 1 for side in site.grid)


class LocalZZW(nn.Module):
    """gelu(standardised(mix(conv_{W(x)}(y)))) + bias, a depthwise convolution whose kernel sees x: -> (B, H, W, C)."""

    def __init__(self, kernel: int, dim: int, hidden: int, layers: int, omega: float) -> None:
        super().__init__()
        self.slow = ContextSlowNet(kernel, dim, hidden, layers, omega)
        self.mix = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kernel = self.slow(x).movedim(-1, 0)[:, None]
        y = F.conv2d(y.movedim(-1, 1), kernel, padding=self.slow.kernel // 2, groups=kernel.shape[0]).movedim(1, -1)
        return F.gelu(standardised(self.mix(y), True)) + self.bias


class RecurrentGate(nn.Module):
    """y(gelu(standardised(k * q(v))) + plane), k and v linear in x (the authors' RGU): (B, H, W, C) -> same."""

    undecayed = ("plane",)

    def __init__(self, grid: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (nn.Linear(dim, dim) for _ in range(4))
        self.plane = nn.Parameter(torch.zeros(grid))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(standardised(self.k(x) * self.q(self.v(x)), False))
        return self.y(gate + resample(self.plane[None, ..., None], tuple(x.shape[1:-1])))

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The plane of another native grid."""
        return resample(value[None, ..., None], tuple(self.plane.shape))[0, ..., 0]


class HyperChannel(nn.Module):
    """x sigmoid(m W m), m the means of the channels and W a kernel over them: (B, H, W, C) -> same."""

    def __init__(self, dim: int, hidden: int, layers: int, omega: float) -> None:
        super().__init__()
        self.dim = dim
        self.slow = SlowNet((dim,), 1, hidden, layers, omega)

    def scores(self, x: Tensor) -> Tensor:
        """m W m, (B, 1, 1, C)."""
        mean = x.mean((1, 2), keepdim=True)
        return mean * self.slow((self.dim,))[:, 0] * mean

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.scores(x))


class HyperInteract(HyperChannel):
    """x sigmoid(s W s * m W' m), s the mean of y over the channels of a place, m over the places of a channel."""

    def __init__(
        self, grid: tuple[int, ...], dim: int, hidden: tuple[int, int], layers: tuple[int, int], omega: float
    ) -> None:
        super().__init__(dim, hidden[0], layers[0], omega)
        self.place = SlowNet(grid, 1, hidden[1], layers[1], omega)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        mean = y.mean(-1, keepdim=True)
        return x * torch.sigmoid(mean * self.place(tuple(y.shape[1:-1])) * mean * self.scores(y))


class Pointwise(nn.Linear):
    """A layer on each token by itself, where a caller's mixer may stand: (B, H, W, C) -> same."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.dim, site.dim)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return torch.Size(grid).numel() * site.dim**2


class TerminatorBlock(nn.Module):
    """drop(gelu(norm(bottleneck(ten branches, and earlier maps))) + bias): (B, H, W, C) -> (B, H, W, C').

    `mixer` is the pointwise layer of the third branch.
    """

    def __init__(
        self, site: Site, mixer: nn.Module, out_dim: int, *, before: int, groups: int, kernels: Sequence[int],
        global_net: tuple[int, int], local_net: tuple[int, int], channel_net: tuple[int, int],
        interact_nets: tuple[tuple[int, int], tuple[int, int]], omega: float, drop: float,
    ) -> None:
        super().__init__()
        dim, grid = site.dim, site.grid
        self.site, self.mixer = site, mixer
        self.slow = SlowNet(grid, dim, *global_net, omega)
        self.local = nn.ModuleList(LocalZZW(kernel, dim, *local_net, omega) for kernel in kernels)
        self.gate, self.gate_context = RecurrentGate(grid, dim), RecurrentGate(grid, dim)
        self.channel = HyperChannel(dim, *channel_net, omega)
        hidden, layers = zip(*interact_nets, strict=True)
        self.interact = HyperInteract(grid, dim, hidden, layers, omega)
        self.bottleneck = nn.Linear((10 + before) * dim, out_dim)
        self.norm = GroupStandardisation(out_dim, groups)
        self.bias = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout2d(drop)

    def forward(self, x: Tensor, *before: Tensor) -> Tensor:
        context = x * self.slow(tuple(x.shape[1:-1]))
        fast = standardised(self.gate_context(context) + self.gate(x), False)
        mixed, channel = standardised(self.mixer(x), False), standardised(self.channel(x), False)
        out = product(context, fast)
        pairs = ((x, channel), (channel, x), (mixed, x), (x, mixed))
        local = [branch(*pair) for branch, pair in zip(self.local, pairs, strict=True)]
        earlier = [repeated(map, x.shape[-1]) for map in before]
        branches = [out, local[1], *earlier[:1], fast, product(context, mixed), local[0], torch.sigmoid(out) * out,
                    local[2], product(context, channel), local[3], *earlier[1:], self.interact(out, x)]
        x = F.gelu(self.norm(self.bottleneck(torch.cat(branches, -1)))) + self.bias
        return self.drop(x.movedim(-1, 1)).movedim(1, -1)


def repeated(x: Tensor, dim: int) -> Tensor:
    """The channels of a map again and again, up to `dim`."""
    return x.repeat(*[1] * (x.ndim - 1), -(-dim // x.shape[-1]))[..., :dim]


class Terminator(Backbone):
    """Blocks at full resolution, the mean over the map, a linear layer. Earlier maps join from the third block on."""

    def __init__(
        self, dims: Sequence[int], *, layers: Sequence[int], groups: int, replace: Any = None, num_classes: int = 1000,
        in_chans: int = 3, img_size: int | Sequence[int] = 32, drop_path_rate: float = 0.0,
        global_pool: Pooling = "avg", hidden: int = 64, **nets: Any,
    ) -> None:
        super().__init__()
        grid = check_sizes(num_classes, in_chans, img_size)
        self.in_chans, self.global_pool = in_chans, global_pool
        build_mixer = choose_mixer(replace, Pointwise)
        names = [f"blocks.{number}" for number in range(len(dims))]
        check_patterns(replace, names)
        rates = drop_path_rates(drop_path_rate, len(dims))  # of whole channels: there is no path to drop
        blocks = []
        for number, (name, out_dim) in enumerate(zip(names, dims, strict=True)):
            site = Site(dims[number - 1] if number else in_chans, 1, 0, number, 1, grid)
            blocks.append(TerminatorBlock(site, build_mixer(site, name), out_dim, before=len(self.earlier(number)),
                                          groups=groups, global_net=(hidden, layers[number]), drop=rates[number],
                                          **nets))
        self.blocks = nn.ModuleList(blocks)
        self.num_features = dims[-1]
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(dict(num_chs=dim, reduction=1, module=name)
                                        for dim, name in zip(dims, names, strict=True))
        self.default_out_indices = tuple(range(len(dims)))

    @staticmethod
    def earlier(number: int) -> tuple[int, ...]:
        """The blocks whose outputs block `number` reads beside that of the one before it."""
        return () if number < 2 else (number - 2,) if number < 4 else (number - 2, number - 3)

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = Head(self.num_features, num_classes, self.global_pool)
        self.removed = () if num_classes else ("head.fc",)

    def features(self, image: Tensor) -> list[Tensor]:
        """The map after each block, (B, C_i, *size), channels-last in memory."""
        maps: list[Tensor] = []
        x = image.movedim(1, -1).contiguous()
        for number, block in enumerate(self.blocks):
            x = block(x, *(maps[place] for place in self.earlier(number)))
            maps.append(x)
        return [x.movedim(-1, 1) for x in maps]

    def forward_features(self, image: Tensor) -> Tensor:
        """The last map, (B, C, *size)."""
        return self.features(image)[-1]

    def forward_head(self, features: Tensor) -> Tensor:
        """Class scores from what `forward_features` gives."""
        return self.head(features.movedim(1, -1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes)."""
        return self.forward_head(self.forward_features(image))

    def feedback(self) -> Tensor:
        """The slow networks' local loss: how far the channel sums of the blocks' global kernels are apart."""
        kernels = [block.slow(block.site.grid).sum(-1) for block in self.blocks]  # type: ignore[operator, union-attr]
        return torch.stack([(first - second).square().mean() for place, second in enumerate(kernels)
                            for first in kernels[:place]]).sum()

    def no_weight_decay(self) -> set[str]:
        return undecayed(self)


_NETS: dict[str, Any] = dict(local_net=(32, 2), channel_net=(32, 2), interact_nets=((16, 2), (64, 2)),
                             builder="terminator")
SIZES: dict[str, dict[str, Any]] = {
    "terminator_cifar100": _NETS | dict(dims=(12, 36, 72, 144, 288), layers=(3, 2, 2, 2, 2), groups=12, img_size=32,
                                        num_classes=100),
    "terminator_nano": _NETS | dict(dims=(8, 16, 16), layers=(2, 1, 1), groups=4, hidden=16, local_net=(8, 1),
                                    channel_net=(8, 1), interact_nets=((8, 1), (8, 1)), img_size=32),
}
SIZES["terminator_cifar10"] = SIZES["terminator_cifar100"] | dict(num_classes=10)


def terminator(
    dims: Sequence[int], layers: Sequence[int], groups: int, local_net: tuple[int, int], channel_net: tuple[int, int],
    interact_nets: tuple[tuple[int, int], tuple[int, int]], hidden: int = 64,
    kernels: Sequence[int] = (3, 9, 5, 7), omega: float = 10.0, mixer: Any = None, **common: Any,
) -> Terminator:
    """A Terminator; a net is (width, layers). A caller's mixer stands for the pointwise layer of the third branch."""
    return Terminator(dims, layers=layers, groups=groups, hidden=hidden, kernels=kernels, local_net=local_net,
                      channel_net=channel_net, interact_nets=interact_nets, omega=omega, replace=mixer, **common)


def plane(value: Tensor) -> Tensor:
    """The authors' (1, 1, *grid) as (*grid)."""
    return value[0, 0]


SLOW: KeyMap = (
    Dropped(r"train_length", "a size that forwards set"),
    (r"Kernel\.bias_pk?", "plane", plane),
    (r"Kernel\.linears\.(.*)", r"layers.\1", pointwise),
    (r"Kernel\.filters\.(\d+)\.linear\.(.*)", r"waves.\1.\2", pointwise),
    (r"Kernel\.output_linear\.(.*)", r"out.\1", pointwise),
    (r"Kernel\.fast_reduce\.(.*)", r"reduce.\1", pointwise),
    (r"Kernel\.fast_fc1\.(.*)", r"context.\1", pointwise),
    (r"Kernel\.fast_linears_x\.(.*)", r"factors.\1", pointwise),
)
GATE: KeyMap = ((r"bias_p", "plane", plane), (r"fast_linear_(.*)", r"\1", pointwise))
INTERACT: KeyMap = (*within(SLOW, r"slow_net_gc(?:_hi)?\.", "slow."), *within(SLOW, r"slow_net_gs(?:_hi)?\.", "place."))
LOCAL: KeyMap = (*within(SLOW, r"slow_net\.", "slow."), (r"local_conv\.channel_mixer\.(.*)", r"mix.\1", pointwise),
                 ("fast_bias", "bias"))
_LAYER: KeyMap = (
    *within(SLOW, r"slow_net_g\.", "slow."),
    *(rule for number in range(4) for rule in (
        *within(SLOW, rf"slow_net_l{number + 1}\.", f"local.{number}.slow."),
        (rf"local_interact_conv_{number + 1}\.channel_mixer\.(.*)", rf"local.{number}.mix.\1", pointwise),
        (rf"bias{number + 1}", f"local.{number}.bias"))),
    *within(GATE, r"Fast_Kernel_rgu\.", "gate."),
    *within(GATE, r"Fast_Kernel_rgu_2\.", "gate_context."),
    *within(SLOW, r"channel_mixer_hci\.slow_net_gc\.", "channel.slow."),
    *within(INTERACT, r"hyper_interact\.", "interact."),
    (r"channel_mixer_mlp\.(.*)", r"mixer.\1", pointwise),
    (r"bottleneck_layer\.(.*)", r"bottleneck.\1", pointwise),
)
AUTHORS: KeyMap = (*within(_LAYER, r"blocks\.(\d+)\.fast_multi_branch\.", r"blocks.\1."),
                   (r"out_layer\.(.*)", r"head.fc.\1"))
TAPS = {r"block(\d+)": r"blocks.\1"}
