"""The library's only softmax(q k^T) v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.record import Where, note, recording


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    where: Where | None = None,
    scale: float | None = None,
) -> Tensor:
    """out = softmax(scale q k^T + bias) v, over the last but one axis of k and v.

    q (B, h, Nq, d), k (B, h, Nk, d), v (B, h, Nk, e), bias broadcastable to (B, h, Nq, Nk), added before the softmax;
    scale defaults to d^-1/2. Fused (scaled_dot_product_attention) normally; while `record` watches, in the explicit
    form with the same numbers. `where()` is asked only then: the token numbers ((G, Nq), (G, Nk)) of rows and columns,
    where the leading axis B is images x G, and -1 stands for padding.
    """
    if bias is not None and bias.ndim == 3:
        bias = bias[None]  # with three axes the fused kernel of the CPU takes up to twice as long
    if not recording():
        if q.is_cuda:
            q, k, v = aligned(q), aligned(k), aligned(v)
        elif q.shape[-1] != v.shape[-1]:
            return _as_wide(q, k, v, bias, scale)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        # The fused kernel's output has its heads inside; the form that ONNX gets of it has not, and views would break.
        return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out
    return affinity(q, k, bias, where=where, scale=scale) @ v


def _as_wide(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """The same with zeros for the channels that one side lacks: the CPU's fused kernel wants values as wide as keys."""
    scale, width = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    whole = max(q.shape[-1], width)
    q, k, v = (F.pad(x, (0, whole - x.shape[-1])) for x in (q, k, v))
    return attend(q, k, v, bias, scale=scale)[..., :width]


def in_parts(*sizes: int) -> bool:
    """Whether work of these sizes may be cut in parts that suit the cache: nothing watches, compiles or differentiates.

    Sizes that an export leaves open cannot choose.
    """
    known = all(isinstance(size, int) for size in sizes)
    return known and not (torch.is_grad_enabled() or recording() or torch.compiler.is_compiling())


def in_cache(x: Tensor) -> bool:
    """Whether work on x may be cut in parts for the cache's sake: on a CPU alone, a GPU would wait between them."""
    return x.is_cpu and in_parts(*x.shape)


def aligned(x: Tensor) -> Tensor:
    """x, copied where rows begin off the multiples of 16 bytes: the fused kernels of GPUs do not read those."""
    steps = (x.storage_offset(), *x.stride()[:-1])
    if all(step * x.element_size() % 16 == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # also steps over an axis of one, which they read too


def affinity(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    *,
    where: Where | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias), written out: for a mechanism that applies the same weights several times."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return note(weights, where)
