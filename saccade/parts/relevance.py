"""Layer-wise relevance propagation in any network, by what its layers call.

Each output hands the relevance that it has back to its inputs, in the shares in which they made it. A layer y = f(x)
does that when it is replaced by  z(x) [y / z(x)], the bracket held fixed: its value is y, and its input times its slope
is x dz/dx R / z. So one backward pass, times the picture, is the relevance of the pixels.

Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation", 2015;
Montavon et al., "Layer-Wise Relevance Propagation: An Overview", 2019 (rules); Ali et al., "XAI for Transformers:
Better Explanations through Conservative Propagation", 2022 (attention and norms).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.core.errors import SaccadeError
from saccade.parts.scores import slopes

Layer = Callable[..., Tensor]  # (x, weight, bias or None) -> y


def held(z: Tensor, y: Tensor, eps: float = 1e-9) -> Tensor:
    """The value of y with the slopes of z: z [y / z]."""
    share = (y / (z + eps * torch.where(z < 0, -1.0, 1.0).to(z.dtype))).detach()
    return z * share


def _epsilon(f: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x_i w_ij / z_j, what the bias gave being lost."""
    return f(x, weight, bias)


def _gamma(f: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What is for the output weighs a quarter more than what is against it."""
    more = None if bias is None else bias + 0.25 * bias.clamp(min=0)
    return held(f(x, weight + 0.25 * weight.clamp(min=0), more), f(x, weight, bias))


def _alpha_beta(f: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Twice the shares in what is for the output, less the shares in what is against it."""
    up, down, w_up, w_down = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
    for_it = f(up, w_up, None if bias is None else bias.clamp(min=0)) + f(down, w_down, None)
    against = f(up, w_down, None if bias is None else bias.clamp(max=0)) + f(down, w_up, None)
    y = f(x, weight, bias)
    return 2 * held(for_it, y) - held(against, y)


def _positive(f: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Positive weights alone, without the bias (the z+ rule)."""
    return held(f(x, weight.clamp(min=0), None), f(x, weight, bias))


# What stands for a linear layer and for a convolution, by rule.
RULES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "epsilon": (_epsilon, _epsilon),
    "gamma": (_gamma, _gamma),
    "alpha_beta": (_alpha_beta, _alpha_beta),
    "z_plus": (_positive, _positive),
    "mixed": (_positive, _epsilon),  # of Li et al., "Beyond Saliency", 2017: also max pooling hands on once a pixel
}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
# Functions of one number each: what comes out is what goes in, for relevance.
BENT = {F.gelu, F.silu, F.hardswish, F.elu, F.leaky_relu, F.mish, F.softplus, F.hardtanh, F.relu6, torch.tanh,
        Tensor.tanh}
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


class RelevanceRules(TorchFunctionMode):
    """Inside it, a network's input times its slope is the relevance of the input.

    Attention weights and what norms divide by are held fixed; of two activations that are multiplied each gets half.
    Raises SaccadeError for a rule that is not in RULES.
    """

    def __init__(self, rule: str) -> None:
        super().__init__()
        if rule not in RULES:
            raise SaccadeError(f"there is no relevance rule {rule!r}; choose from {', '.join(RULES)}")
        self.linear, self.convolution = RULES[rule]
        self.once = rule == "mixed"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self.linear(F.linear, *_three(args, kwargs))
        if func in CONVOLUTIONS:
            x, weight, bias = _three(args, kwargs)
            rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
            return self.convolution(lambda x, w, b: func(x, w, b, *args[3:], **rest), x, weight, bias)
        if func is F.max_pool2d and self.once:
            return _once(*func(*args, **kwargs | {"return_indices": True}))
        if func in BENT:
            return held(args[0], func(*args, **{name: value for name, value in kwargs.items() if name != "inplace"}))
        if func in SOFTMAX:
            return func(*args, **kwargs).detach()
        if func is F.scaled_dot_product_attention:
            return func(args[0].detach(), args[1].detach(), *args[2:], **kwargs)
        if func is F.layer_norm:
            return _centred(args[0], tuple(range(-len(args[1]), 0)), func(*args, **kwargs), *args[2:4])
        if func in PRODUCTS and all(_activation(factor) for factor in args[:2]):
            return _halves(*args)
        if func is torch.addcmul and all(_activation(factor) for factor in args[1:3]):
            return args[0] + kwargs.get("value", 1) * _halves(*args[1:3])
        return func(*args, **kwargs)


def _halves(a: Tensor, b: Tensor) -> Tensor:
    """a b, of which each gets half."""
    return a / 2 * b.detach() + a.detach() * (b / 2)


def relevance(model: nn.Module, image: Tensor, target: Tensor, rule: str = "epsilon") -> Tensor:
    """The relevance (B, C, H, W) of each number of the pictures for the score of `target` (B,): by a rule of RULES."""
    with RelevanceRules(rule):
        slope = slopes(model, image, target)
    return image * slope


def _once(y: Tensor, winner: Tensor) -> Tensor:
    """Maxima y (B, C, h, w) of windows, of those that share a winner the last alone with a slope."""
    winners, number = winner.flatten(2), torch.arange(y[0, 0].numel(), device=y.device).expand(*y.shape[:2], -1)
    last = torch.full((*y.shape[:2], int(winners.amax()) + 1), -1, device=y.device)
    last = last.scatter_reduce(2, winners, number, "amax")
    return torch.where((last.gather(2, winners) == number).view(y.shape), y, y.detach())


def _three(args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    given = dict(zip(("input", "weight", "bias"), args[:3], strict=False))
    both = given | {name: value for name, value in kwargs.items() if name in ("input", "weight", "bias")}
    return both["input"], both["weight"], both.get("bias")


def _activation(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.requires_grad and value.ndim > 0


def _centred(
    x: Tensor, axes: tuple[int, ...], y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A layer norm y of x whose divisor is held fixed."""
    middle = x - x.mean(axes, keepdim=True)
    scaled = middle if weight is None else middle * weight
    plain = y if bias is None else y - bias
    out = held(scaled, plain)
    return out if bias is None else out + bias
