"""Linear interpreters: the linear system that a network is at one input, replayed forwards and back.

At a picture x each non-linear call takes a decision (which side of a ReLU, which pixel of a max pooling, the gain of a
smooth activation, mean and deviation in a norm). With the decisions of x held fixed the network is affine in a probe u,
    F_x(u) = A_x u + b_x,   F_x(x) = F(x),
so that A_x can be read by columns (what one pixel writes) and, transposed, by rows (the filter that reads a score):
    F_c(x) = sum over pixels of (A_x[c] x) + b_x[c]: each pixel votes.

Navarrete Michelini, Liu, Lu, Jiang, "A Tour of Convolutional Networks Guided by Linear Interpreters", 2019.

Decisions are stored in one forward and replayed in order; the authors carry x and u as two halves of a batch. Of smooth
activations the gain f(a) / a is held; the slope f'(a), what is left going to b_x, is the other exact choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.core.card import Card
from saccade.core.errors import SaccadeError

CARD = Card(
    "A Tour of Convolutional Networks Guided by Linear Interpreters",
    authors="Navarrete Michelini, Liu, Lu, Jiang",
    year=2019,
    systems=("linearscope",),
    arxiv="1908.05168",
    read="fact sheet",
    keywords="linear interpreter, LinearScope, pixel votes, transposed system, impulse response, biases",
    kinds=("explain", "attribution"),
    methods={"linearscope": "linearscope"},
    tests=("tests/papers/test_linearscope.py",),
)

RECTIFIERS = {F.relu, torch.relu, Tensor.relu, F.relu_, torch.relu_, Tensor.relu_, F.leaky_relu, F.prelu, torch.prelu,
              F.relu6, F.hardtanh, torch.clamp, Tensor.clamp}
SMOOTH = {F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.elu, F.mish, F.softplus, F.sigmoid, torch.sigmoid,
          Tensor.sigmoid, F.tanh, torch.tanh, Tensor.tanh}
POOLINGS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
            F.adaptive_max_pool3d}
NORMS = {F.layer_norm, F.instance_norm, F.group_norm}
ATTENTION = {F.softmax, torch.softmax, Tensor.softmax, F.scaled_dot_product_attention}
STATISTICS = {torch.var_mean}  # of norms that are written out
KNOWN = RECTIFIERS | SMOOTH | POOLINGS | NORMS | STATISTICS
PRODUCTS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div,
            Tensor.__truediv__, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum,
            F.linear, torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d, torch.addcmul}

Replay = Callable[[Tensor], Any]


class _Decisions(TorchFunctionMode):
    """Takes decisions where `stored` is None, else replays those of `stored` in order."""

    def __init__(self, hold: str, stored: list[Replay] | None = None) -> None:
        super().__init__()
        self.hold, self.taken = hold, stored if stored is not None else []
        self.left = None if stored is None else iter(stored)
        self.smooth = self.attention = self.product = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "inplace"}
        self.attention |= func in ATTENTION
        if func in PRODUCTS and self.left is not None:  # in a replay, what has a gradient comes from the probe
            factors = args[1:] if func is torch.addcmul else args  # einsum may have them in one list
            factors = factors[1] if len(factors) > 1 and isinstance(factors[1], (tuple, list)) else factors
            self.product |= sum(isinstance(one, Tensor) and one.requires_grad for one in factors) > 1
        if func not in KNOWN or not (args[0] if args else kwargs["input"]).is_floating_point():
            return func(*args, **kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        if self.left is not None:
            return next(self.left)(x)
        self.smooth |= func in SMOOTH | NORMS | STATISTICS
        at = x.detach()
        if func in STATISTICS:
            self.taken.append(_constant(func(at, *rest, **kwargs)))
        elif func in POOLINGS:
            self.taken.append(_chosen_pixels(func, at, rest, kwargs))
        elif func in NORMS:
            y = func(at, *rest, **kwargs)
            self.taken.append(_affine(_norm_scale(func, at, rest, kwargs), at, y))
        else:
            self.taken.append(_bent(func, at, rest, kwargs, self.hold))
        return self.taken[-1](x)


class LinearSystem:
    """The affine system A u + b of a `model` in evaluation mode at pictures x (B, C, H, W); probes u have x's shape.

    `hold` is what is kept of a smooth activation: its "gain" f(a) / a or its "slope" f'(a). `piecewise_linear` says
    that no smooth call was met, in the making of weights neither: then A is the Jacobian too.

    Raises SaccadeError for another `hold`, a model whose output is no tensor, softmax attention, and a network
    that is not affine even so: products of two activations are seen, what else there may be is tried out on a probe.
    """

    def __init__(self, model: nn.Module, image: Tensor, hold: str = "gain") -> None:
        if hold not in ("gain", "slope"):
            raise SaccadeError(f'hold={hold!r}: choose "gain" or "slope"')
        self.model, self.hold, self.image = model, hold, image.detach()
        # With gradients, here and in all replays: some modules compute otherwise where there are none.
        with torch.enable_grad(), (mode := _Decisions(hold)):
            output = getattr(found := model(self.image.clone().requires_grad_()), "logits", found)
        if not isinstance(output, Tensor):
            raise SaccadeError(f"the model returned {type(output).__name__}: a linear system needs one tensor")
        self.decisions, self.piecewise_linear = mode.taken, not mode.smooth
        if mode.attention:
            raise SaccadeError(f"{type(model).__name__} has softmax attention: it has no linear system; choose a "
                               "network of convolutions, activations, max pooling and norms")
        self.output = output.detach()
        self.bias = self.forward(torch.zeros_like(self.image)).detach()
        self._try_out()

    def forward(self, probe: Tensor) -> Tensor:
        """A u + b."""
        with torch.enable_grad(), _Decisions(self.hold, self.decisions):
            output = self.model(probe if probe.requires_grad else probe.clone().requires_grad_())
        return getattr(output, "logits", output)

    def apply(self, probe: Tensor) -> Tensor:
        """A u: what a probe (B, C, H, W) writes, the bias taken away. A single pixel gives a column."""
        return self.forward(probe).detach() - self.bias

    def transposed(self, output: Tensor) -> Tensor:
        """A^T v (B, C, H, W) of v, shaped as the output. A single score gives a row: the filter that reads it."""
        with torch.enable_grad():
            probe = torch.zeros_like(self.image).requires_grad_()
            return torch.autograd.grad(self.forward(probe), probe, output)[0]

    def _multiplies(self) -> bool:
        """Whether anything is a product of two numbers that both come from the picture."""
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in learned:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad(), (mode := _Decisions(self.hold, self.decisions)):
                self.model(self.image.clone().requires_grad_())
        finally:
            for parameter in learned:
                parameter.requires_grad_()
        return mode.product

    def _try_out(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = 10 * float(self.image.square().mean().sqrt())  # large: gates near their middle are almost affine
        probe = (size or 1.0) * torch.randn(self.image.shape, generator=generator).to(self.image)
        whole, parts = self.apply(self.image + probe), self.apply(self.image) + self.apply(probe)
        off = (whole - parts).abs().amax() > 1e-4 * torch.stack([whole, self.bias]).abs().amax()
        if off or self._multiplies():
            raise SaccadeError(f"{type(self.model).__name__} multiplies activations with each other or bends them in a "
                               "way that is not known: it has no linear system; choose a network of convolutions, "
                               "activations, max pooling and norms")


def linearscope(model: nn.Module, image: Tensor, target: Tensor, hold: str = "gain") -> Tensor:
    """The votes of the pixels (B, H, W): sum over colours of A_x[target] x. Their sum is the score less b_x[target]."""
    system = LinearSystem(model, image, hold)
    row = system.transposed(F.one_hot(target, system.output.shape[1]).to(system.output))
    return (row * image).sum(1)


linearscope.signed = True  # type: ignore[attr-defined]


def _constant(held: Any) -> Replay:
    """u -> what was found at x."""
    return lambda probe: held


def _affine(scale: Tensor, x: Tensor, y: Tensor) -> Replay:
    """u -> scale u + (y - scale x)."""
    scale, shift = scale.detach(), (y - scale * x).detach()
    return lambda probe: scale * probe + shift


def _bent(func: Any, x: Tensor, rest: Any, kwargs: Any, hold: str) -> Replay:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        y = func(leaf.clone(), *rest, **kwargs)
        slope = torch.autograd.grad(y.sum(), leaf)[0]
    y = y.detach()
    if hold == "slope" or func in RECTIFIERS:
        return _affine(slope, x, y)
    gain = torch.where(x.abs() > 1e-6, y / torch.where(x == 0, 1.0, x), slope)
    return _affine(gain, x, y)  # what is left is f(0) at x = 0 alone


def _chosen_pixels(func: Any, x: Tensor, rest: Any, kwargs: Any) -> Replay:
    _, places = func(x, *rest, **(kwargs | {"return_indices": True}))
    axes = 1 if func in (F.max_pool1d, F.adaptive_max_pool1d) else 3 if "3d" in func.__name__ else 2
    return lambda probe: probe.flatten(-axes).gather(-1, places.flatten(-axes)).view(places.shape)


def _norm_scale(func: Any, x: Tensor, rest: Any, kwargs: Any) -> Tensor:
    """The factor of a norm at x, its statistics held: weight / deviation."""
    bare = dict(zip(_NORM_ARGUMENTS[func], rest, strict=False)) | kwargs
    weight, eps = bare.get("weight"), bare.get("eps", 1e-5)
    if func is F.layer_norm:
        axes = tuple(range(-len(bare["normalized_shape"]), 0))
        return (x.var(axes, unbiased=False, keepdim=True) + eps).rsqrt() * (1.0 if weight is None else weight)
    groups = x.shape[1] if func is F.instance_norm else bare["num_groups"]
    grouped = x.unflatten(1, (groups, -1))
    deviation = grouped.var(tuple(range(2, grouped.ndim)), unbiased=False, keepdim=True)
    scale = (deviation + eps).rsqrt().expand_as(grouped).flatten(1, 2)
    return scale if weight is None else scale * weight.view(-1, *[1] * (x.ndim - 2))


_NORM_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.layer_norm: ("normalized_shape", "weight", "bias", "eps"),
    F.instance_norm: ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    F.group_norm: ("num_groups", "weight", "bias", "eps"),
}
