"""Linear recurrences over a sequence, in parallel: the selective scan of Mamba and the state space duality of Mamba-2.

A channel keeps a state h of n numbers that decays, takes the token in and is read out,
    h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t,    y_t = c_t . h_t,
with steps dt, inputs b and readouts c that depend on the token. Token by token that is a loop over the whole length.
Here the sequence is cut in chunks: each finds the state that it would leave behind on its own, what enters every chunk
follows from those by doubling (log2 of their number), and all chunks then run side by side from what enters them.
On a CPU without gradients tokens do go one by one, but all else is done for a block of them that stays in the cache.

In float32 at least, under autocast too. Any length: tokens that fill the last chunk have dt = 0 and change no state.
`saccade.ops.reference` has both once more, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import e, log2, prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.core.record import recording
from saccade.ops.attend import in_cache
from saccade.ops.precision import full_precision
from saccade.ops.sizes import ceil_div

TRACED = 16  # steps of a chunk where sizes are open or steps become nodes of a graph
ENOUGH = 2**15  # states a token that fill a step by themselves: chunks would only add work (measured on a CPU)
TOGETHER = 2**17  # states that the chunks of a step should have together: a step stays in the cache
BLOCK = 2**16  # states of a block of tokens whose decays and states stay in the cache (measured)
NARROW = 2**9  # states a token below which a token's call costs more than two passes of the chunks (measured)
LOG2E = log2(e)  # powers of two: where decays vanish, exp is a hundred times as slow as exp2 on a CPU (measured)
ROUNDS = 16  # doublings where the number of chunks is open: 2**16 chunks, a million tokens
FEW = 8  # chunks that pass their states on one by one, with fewer copies than doubling makes
MATRIX = 64  # steps of a chunk in matrix form, at most
_tallies: list[list[int]] = []


@contextmanager
def counted_states() -> Iterator[list[int]]:
    """Inside the block each selective scan adds to this list how many states it takes through all its tokens: L E n.

    Each costs an exponential and a multiply-add, however the scan is computed; its readout is a matrix product.
    """
    tally: list[int] = []
    _tallies.append(tally)
    try:
        yield tally
    finally:
        _tallies.pop()


def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_t = c_t . h_t, h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t, a state of n numbers a channel.

    u, dt, y (*lead, L, E); b, c (*lead, L, n), shared by the channels; a (E, n), or with leading axes that broadcast to
    `lead` (one a direction). dt >= 0 and a <= 0, or states grow. States are float32 at least, y is of u's type.
    (Gu, Dao, "Mamba", 2023, section 3.)
    """
    for tally in _tallies:
        tally.append(u.numel() * b.shape[-1])
    wide, given = torch.promote_types(u.dtype, torch.float32), u.dtype
    u, dt, a, b, c = (value.to(wide) for value in (u, dt, a, b, c))
    steps = _steps(u, b)
    with full_precision(u):
        if _in_blocks(u, b):
            return _token_by_token(u, dt, a, b, c).to(given)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and _known(u):
            # The states of all tokens outweigh everything else by n: computed again in the backward pass, not kept.
            out: Tensor = checkpoint(_scan, u, dt, a, b, c, steps, use_reentrant=False, preserve_rng_state=False)
            return out.to(given)
        return _scan(u, dt, a, b, c, steps).to(given)


def _in_blocks(u: Tensor, b: Tensor) -> bool:
    return in_cache(u) and u[..., 0, :].numel() * b.shape[-1] >= NARROW


def _token_by_token(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan in buffers: decays and inputs of a block of tokens at once, one call a token, then the readouts."""
    *lead, length, width = u.shape
    count, lanes = b.shape[-1], prod(lead)
    if lanes * width * count > BLOCK and len(lead) >= a.ndim - 1 and lead[0] > 1:  # image by image
        images = zip(*(value.split(1) for value in (u, dt, b, c)), strict=True)
        return torch.cat([_token_by_token(u, dt, a, b, c) for u, dt, b, c in images])
    steps = max(1, min(length, BLOCK // (lanes * width * count)))
    a = a.mT.contiguous() * LOG2E  # (*, n, E)
    x, dt, b = (value.movedim(-2, 0) for value in ((dt * u).unsqueeze(-3), dt.unsqueeze(-3), b.unsqueeze(-3)))
    c = c.movedim(-2, 0).reshape(length * lanes, 1, count)
    out = u.new_empty(length * lanes, 1, width)
    decays, states = u.new_empty(2, steps, *lead, count, width)
    carried = u.new_zeros(*lead, count, width)
    blocks = (*(value.split(steps) for value in (x, dt, b.mT)), *(value.split(steps * lanes) for value in (c, out)))
    for x, dt, b, c, y in zip(*blocks, strict=True):
        if len(x) < steps:
            decays, states = decays[:len(x)], states[:len(x)]
        torch.mul(dt, a, out=decays).exp2_()
        torch.mul(x, b, out=states)
        before = carried
        for decay, state in zip(decays.unbind(), states.unbind(), strict=True):
            before = state.addcmul_(decay, before)
        carried.copy_(before)
        torch.bmm(c, states.view(-1, count, width), out=y)
    return out.view(length, *lead, width).movedim(0, -2)


def _scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, steps: int) -> Tensor:
    length = u.shape[-2]
    a = a.mT.contiguous().unsqueeze(-3) * LOG2E  # (*, 1, n, E): states as (*lead, chunks, n, E)
    x, dt, b, c = (_chunks(value, steps) for value in (dt * u, dt, b, c))
    inputs = list(zip(*(value.unbind(-2) for value in (x, dt, b)), strict=True))
    state = torch.zeros_like(x[..., 0, None, :] * b[..., 0, :, None])
    if not _known(x) or x.shape[-3] > 1:
        left = state
        for x_t, dt_t, b_t in inputs:
            left = _step(left, x_t, dt_t, b_t, a)
        state = entering(left, torch.exp2(dt.sum(-2).unsqueeze(-2) * a), axis=-3)
    outputs = []
    for (x_t, dt_t, b_t), c_t in zip(inputs, c.unbind(-2), strict=True):
        state = _step(state, x_t, dt_t, b_t, a)
        outputs.append(_read(c_t, state))
    return _joined(torch.stack(outputs, -2), length)


def _read(c: Tensor, state: Tensor) -> Tensor:
    """What (.., n) reads of states (.., n, E); matrices one number wide would put a guard on open sizes."""
    return c * state.squeeze(-2) if state.shape[-2] == 1 else (c.unsqueeze(-2) @ state).squeeze(-2)


def _step(state: Tensor, x: Tensor, dt: Tensor, b: Tensor, a: Tensor) -> Tensor:
    decay = (dt.unsqueeze(-2) * a).exp2_()
    if torch.is_grad_enabled():
        return torch.addcmul(decay * state, x.unsqueeze(-2), b.unsqueeze(-1))
    return decay.mul_(state).addcmul_(x.unsqueeze(-2), b.unsqueeze(-1))  # no gradient: one fresh tensor a step


def _steps(u: Tensor, b: Tensor) -> int:
    """Tokens a chunk: few, so that many chunks share a step of the loop, and enough that a step stays in the cache."""
    if torch.compiler.is_compiling() or not _known(u):
        return TRACED
    length = u.shape[-2]
    states = u[..., 0, :].numel() * b.shape[-1]
    if states >= ENOUGH or recording():
        return max(length, 1)
    chunks = max(1, min(length // TRACED, TOGETHER // max(states, 1)))
    return -(-length // chunks)


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan with one decay a head, as matrices: y_t = c_t . H_t, H_t = exp(dt_t a) H_{t-1} + dt_t b_t x_t^T.

    x, y (*lead, L, h, p); dt (*lead, L, h); a (h,); b, c (*lead, L, g, n), each group for h / g heads in a row. Inside
    a chunk y = (M o (c b^T)) (dt x), M_ij = exp(a (dt_{j+1} + ... + dt_i)) for i >= j; states pass on between chunks.
    (Dao, Gu, "Transformers are SSMs", 2024, section 6.)
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, a, b, c = (value.to(wide) for value in (x, dt, a, b, c))
    groups, length = b.shape[-2], x.shape[-3]
    with full_precision(x):
        if recording():  # the recurrence itself: what `cost` declares
            return _ssd_by_scan(x, dt, a, b, c)
        steps = ceil_div(length, max(ceil_div(length, MATRIX), 1)) if _known(x) else MATRIX  # chunks of one length
        # (*lead, chunks, g, h / g, steps, .), but b and c without heads
        x = _chunks((x * dt.unsqueeze(-1)).flatten(-2), steps).unflatten(-1, (groups, -1, x.shape[-1]))
        x = x.movedim(-4, -2)
        decay = _chunks(dt * (a * LOG2E), steps)
        decay = decay.unflatten(-1, (groups, -1)).movedim(-3, -1).cumsum(-1)  # (*, g, h / g, steps)
        b, c = (_chunks(value.flatten(-2), steps).unflatten(-1, (groups, -1)).movedim(-3, -2) for value in (b, c))
        future = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu(1)
        kept = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(future, -torch.inf).exp2()
        out = (kept * (c @ b.mT).unsqueeze(-3)) @ x
        if not _known(x) or x.shape[-5] > 1:
            whole = decay[..., -1:]
            left = b.mT.unsqueeze(-3) @ (x * (whole - decay).exp2().unsqueeze(-1))  # (*, g, h / g, n, p)
            state = entering(left, whole.unsqueeze(-1).exp2(), axis=-5)
            out = out + decay.exp2().unsqueeze(-1) * (c.unsqueeze(-3) @ state)
        return _joined(out.movedim(-2, -4).flatten(-3), length).unflatten(-1, (-1, x.shape[-1]))


def _ssd_by_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    groups, width = b.shape[-2], x.shape[-1]
    u, dt = (value.unflatten(-2, (groups, -1)).flatten(-2).movedim(-2, -3)
             for value in (x, dt.unsqueeze(-1).expand_as(x)))  # (*lead, g, L, h / g p)
    b, c = b.movedim(-2, -3), c.movedim(-2, -3)
    rates = a.repeat_interleave(width).unflatten(0, (groups, -1)).unsqueeze(-1).expand(-1, -1, b.shape[-1])
    return selective_scan(u, dt, rates, b, c).movedim(-3, -2).flatten(-2).unflatten(-1, (-1, width))


def entering(left: Tensor, decay: Tensor, axis: int) -> Tensor:
    """The state that enters each chunk: s_{k+1} = decay_k s_k + left_k, s_0 = 0, along `axis`; many by doubling."""
    count = left.shape[axis]
    if isinstance(count, int) and count <= FEW:
        states = [torch.zeros_like(left.select(axis, 0))]
        for leaves, kept in zip(left.unbind(axis)[:-1], decay.unbind(axis)[:-1], strict=True):
            states.append(torch.addcmul(leaves, kept, states[-1]))
        return torch.stack(states, axis)
    rounds = (count - 1).bit_length() if isinstance(count, int) else ROUNDS
    for number in range(rounds):
        left = torch.addcmul(left, decay, _delayed(left, 2**number, axis))
        if number + 1 < rounds:
            decay = decay * _delayed(decay, 2**number, axis)
    return _delayed(left, 1, axis)


def _delayed(x: Tensor, by: int, axis: int) -> Tensor:
    """x moved `by` places along an axis, zeros in front."""
    return F.pad(x, [*[0, 0] * (-axis - 1), by, 0]).narrow(axis, 0, x.shape[axis])


def _chunks(x: Tensor, steps: int) -> Tensor:
    """(*lead, L, C) -> (*lead, chunks, steps, C), zeros at the end."""
    missing = (-x.shape[-2]) % steps
    if not (isinstance(missing, int) and missing == 0):
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (x.shape[-2] // steps, steps))


def _joined(x: Tensor, length: int) -> Tensor:
    """Undo `_chunks`, for `length` tokens."""
    x = x.flatten(-3, -2)
    extra = x.shape[-2] - length
    return x if isinstance(extra, int) and extra == 0 else F.pad(x, (0, 0, 0, -extra))


def _known(x: Tensor) -> bool:
    return all(isinstance(side, int) for side in x.shape)
