from __future__ import annotations

import random
from math import prod

import pytest
import torch
import torch.fx.experimental._config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.core.record import record
from saccade.ops import neighborhood, reference
from saccade.ops.neighborhood import neighborhood_attention

Axes = tuple[int, ...]


def draw(grid: Axes, kernel: Axes, heads: int = 2, dim: int = 3, batch: int = 1, seed: int = 0) -> list[Tensor]:
    """q, k, v as views of one projection, and a bias, in float64."""
    rng = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, *grid, 3, heads, dim, dtype=torch.float64, generator=rng)
    bias = torch.randn(heads, *(2 * k - 1 for k in kernel), dtype=torch.float64, generator=rng)
    return [*qkv.unbind(-3), bias]


@st.composite
def cases(draw_: st.DrawFn, rank: int) -> tuple[Axes, Axes, Axes]:
    """Grids that fit: odd, prime, non-square; some just one step longer than the window."""
    widest, most_dilated, longest = {1: (7, 3, 40), 2: (7, 3, 11), 3: (3, 2, 5)}[rank]
    kernel = tuple(draw_(st.integers(2, widest)) for _ in range(rank))
    dilation = tuple(draw_(st.integers(1, most_dilated if k < 5 else 1)) for k in kernel)
    grid = tuple(draw_(st.integers(k * e, max(k * e + 1, longest))) for k, e in zip(kernel, dilation, strict=True))
    return grid, kernel, dilation


def check(grid: Axes, kernel: Axes, dilation: Axes) -> None:
    q, k, v, bias = draw(grid, kernel, heads=1 if prod(grid) * prod(kernel) > 1000 else 2)
    expected = reference.neighborhood_attention(q, k, v, kernel, dilation, bias)
    torch.testing.assert_close(neighborhood_attention(q, k, v, kernel, dilation, bias), expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(1))
def test_sequences(case: tuple[Axes, Axes, Axes]) -> None:
    check(*case)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(cases(2))
def test_images(case: tuple[Axes, Axes, Axes]) -> None:
    check(*case)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(cases(3))
def test_volumes(case: tuple[Axes, Axes, Axes]) -> None:
    check(*case)


@st.composite
def grouped(draw_: st.DrawFn, rank: int) -> tuple[Axes, Axes, Axes, Axes, tuple[bool, ...]]:
    """The same with groups of queries that share a window, and causal axes; long enough for several tiles."""
    grid, kernel, dilation = draw_(cases(rank))
    stride = tuple(draw_(st.integers(1, k)) for k in kernel)
    causal = tuple(draw_(st.booleans()) for _ in kernel)
    grid = tuple(side + draw_(st.integers(0, 20 if rank == 1 else 4)) for side in grid)
    return grid, kernel, dilation, stride, causal


def check_grouped(grid: Axes, kernel: Axes, dilation: Axes, stride: Axes, causal: tuple[bool, ...]) -> None:
    q, k, v, bias = draw(grid, kernel, heads=1)
    how = dict(stride=stride, causal=causal)
    expected = reference.neighborhood_attention(q, k, v, kernel, dilation, bias, **how)
    out = neighborhood_attention(q, k, v, kernel, dilation, bias, **how)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grouped(1))
def test_stride_and_causality_on_sequences(case) -> None:
    check_grouped(*case)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(grouped(2))
def test_stride_and_causality_on_images(case) -> None:
    check_grouped(*case)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(grouped(3))
def test_stride_and_causality_on_volumes(case) -> None:
    check_grouped(*case)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_long_sequences_in_small_tiles(stride: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """First, inner and last two tiles, whatever the cost would choose, as where the size is left open."""
    monkeypatch.setattr(neighborhood, "_tiles", neighborhood._tiles.__wrapped__)  # not from the cache
    monkeypatch.setattr(neighborhood, "_tile_sizes", lambda grid, windows: (None,) * len(grid))
    for length in (40, 41, 57, 64):
        q, k, v, bias = draw((length,), (5,), heads=1)
        expected = reference.neighborhood_attention(q, k, v, (5,), (1,), bias, stride=(stride,), causal=(causal,))
        out = neighborhood_attention(q, k, v, 5, 1, bias, stride=stride, causal=causal)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_a_stride_of_the_kernel_is_window_attention() -> None:
    q, k, v, _ = draw((15, 9), (5, 3), batch=2)
    out = neighborhood_attention(q, k, v, (5, 3), stride=(5, 3))
    for y in range(0, 15, 5):
        for x in range(0, 9, 3):
            near = (slice(None), slice(y, y + 5), slice(x, x + 3))
            window = neighborhood_attention(q[near], k[near], v[near], (5, 3))
            torch.testing.assert_close(out[near], window)


def dense(q: Tensor, k: Tensor, v: Tensor, kernel: Axes, dilation: Axes, bias: Tensor) -> Tensor:
    """The textbook form under autograd: all pairs, with -inf where `reference.neighbours` has no pair."""
    _, *grid, heads, dim = q.shape
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    logits = dim**-0.5 * q @ k.transpose(-2, -1)
    places = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid)).tolist()
    masked = torch.full(logits.shape[1:], -torch.inf, dtype=q.dtype)
    for row, i in enumerate(places):
        windows = [set(reference.neighbours(*axis)) for axis in zip(i, grid, kernel, dilation, strict=True)]
        for column, j in enumerate(places):
            if all(to in window for to, window in zip(j, windows, strict=True)):
                step = [(to - at) // e + k_ - 1 for to, at, e, k_ in zip(j, i, dilation, kernel, strict=True)]
                masked = masked.index_put((torch.arange(heads), torch.tensor(row), torch.tensor(column)),
                                          bias[(slice(None), *step)])
    out = (logits + masked).softmax(-1) @ v
    return out.transpose(1, 2).reshape(q.shape[0], *grid, heads, dim)


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"), [((23,), (5,), (2,)), ((9, 7), (3, 2), (2, 1)), ((5, 4, 3), (3, 2, 2), (1, 2, 1))]
)
def test_gradients(grid: Axes, kernel: Axes, dilation: Axes) -> None:
    leaves = [x.detach().requires_grad_() for x in draw(grid, kernel, batch=2)]
    cotangent = torch.randn(leaves[0].shape, dtype=torch.float64)
    expected = torch.autograd.grad((dense(*leaves[:3], kernel, dilation, leaves[3]) * cotangent).sum(), leaves)
    q, k, v, bias = leaves
    got = torch.autograd.grad((neighborhood_attention(q, k, v, kernel, dilation, bias) * cotangent).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_many_tiles_of_all_kinds() -> None:
    """Large enough for first, inner and last two tiles on both axes; random queries against their own softmax."""
    grid, kernel = (37, 41), (4, 7)
    q, k, v, bias = draw(grid, kernel, heads=1, batch=2)
    sizes = neighborhood._tile_sizes(grid, tuple(neighborhood.Window(side, 1) for side in kernel))
    assert all(4 * queries < side for queries, side in zip(sizes, grid, strict=True))
    out = neighborhood_attention(q, k, v, kernel, 1, bias)
    rng = random.Random(0)
    for _ in range(150):
        y, x, b = rng.randrange(37), rng.randrange(41), rng.randrange(2)
        rows, columns = reference.neighbours(y, 37, 4, 1), reference.neighbours(x, 41, 7, 1)
        near = (b, slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1), 0)
        logits = (k[near] @ q[b, y, x, 0]) * 3**-0.5
        logits = logits + bias[0, rows[0] - y + 3 : rows[-1] - y + 4, columns[0] - x + 6 : columns[-1] - x + 7]
        expected = logits.flatten().softmax(0) @ v[near].flatten(0, 1)
        torch.testing.assert_close(out[b, y, x, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 4])
def test_locality(kernel: int, dilation: int) -> None:
    """Moving a token moves the queries that have it in their window, and not a bit of any other."""
    grid = (17, 13)
    q, k, v, bias = draw(grid, (kernel, kernel))
    out = neighborhood_attention(q, k, v, kernel, dilation, bias)
    for y, x in ((0, 0), (8, 6), (16, 12), (3, 11)):
        k2, v2 = k.clone(), v.clone()
        k2[:, y, x] += 1.0
        v2[:, y, x] += 1.0
        moved = (neighborhood_attention(q, k2, v2, kernel, dilation, bias) != out)[0].flatten(2).any(-1)
        expected = torch.tensor(
            [[y in reference.neighbours(i, 17, kernel, dilation) and x in reference.neighbours(j, 13, kernel, dilation)
              for j in range(13)] for i in range(17)]
        )
        assert torch.equal(moved, expected)


def test_no_bias_and_a_given_scale() -> None:
    q, k, v, _ = draw((9, 17), (3, 4), batch=2)
    expected = reference.neighborhood_attention(q, k, v, (3, 4), (2, 1), scale=0.2)
    torch.testing.assert_close(neighborhood_attention(q, k, v, (3, 4), (2, 1), scale=0.2), expected, rtol=0, atol=1e-12)


def test_window_of_the_whole_map_is_full_attention() -> None:
    q, k, v, _ = draw((5, 6), (5, 6))
    heads_first = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    full = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=0.3)
    torch.testing.assert_close(neighborhood_attention(q, k, v, (5, 6), scale=0.3).flatten(1, 2).transpose(1, 2), full)


def test_dilation_is_attention_on_each_sub_grid() -> None:
    q, k, v, bias = draw((20, 26), (5, 3))
    out = neighborhood_attention(q, k, v, (5, 3), (4, 2), bias)
    for y in range(4):
        for x in range(2):
            sub = [t[:, y::4, x::2] for t in (q, k, v)]
            torch.testing.assert_close(out[:, y::4, x::2], neighborhood_attention(*sub, (5, 3), 1, bias))


def test_images_do_not_influence_each_other() -> None:
    q, k, v, bias = draw((19, 30), (7, 7), batch=3)
    out = neighborhood_attention(q, k, v, 7, 1, bias)
    torch.testing.assert_close(out[1:2], neighborhood_attention(q[1:2], k[1:2], v[1:2], 7, 1, bias))
    assert neighborhood_attention(q[:0], k[:0], v[:0], 7, 1, bias).shape == (0, 19, 30, 2, 3)


class Mixer(torch.nn.Module):
    def __init__(self, kernel: int, dilation: int, rank: int) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.rpb = torch.nn.Parameter(torch.randn(2, *(2 * kernel - 1,) * rank))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, 4)).unbind(-3)
        return neighborhood_attention(q, k, v, self.kernel, self.dilation, self.rpb)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    mixer, x = Mixer(3, 2, 2), torch.randn(2, 21, 18, 24, requires_grad=True)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x))
    got, expected = (torch.autograd.grad(f(x).square().sum(), [x, mixer.rpb]) for f in (compiled, mixer))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_exported_once_runs_at_any_size() -> None:
    mixer, x, free = Mixer(4, 3, 2).eval(), torch.randn(2, 16, 24, 24), torch.export.Dim.DYNAMIC
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # so that one tile is no special case
        exported = torch.export.export(mixer, (x,), dynamic_shapes=(dict.fromkeys(range(3), free),)).module()
    for shape in ((2, 16, 24), (1, 12, 12), (3, 13, 31), (1, 28, 33)):
        x = torch.randn(*shape, 24)
        torch.testing.assert_close(exported(x), mixer(x))


def test_autocast_and_half() -> None:
    mixer, x = Mixer(7, 1, 2), torch.randn(2, 16, 19, 24, requires_grad=True)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    out.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and mixer.rpb.grad is not None


@pytest.mark.parametrize(("grid", "dilation"), [((15, 26), 2), ((26, 31), 1), ((8, 8), 1)])
def test_recorded_weights_are_those_of_the_neighbours(grid: Axes, dilation: int) -> None:
    mixer = torch.nn.Sequential(Mixer(3, dilation, 2)).eval()
    x = torch.randn(2, *grid, 24)
    expected = mixer(x)
    with record(mixer) as recording:
        torch.testing.assert_close(mixer(x), expected)
    (affinity,) = recording.affinities.values()
    weights = affinity.dense(batch=2)
    assert weights.shape == (2, 2, prod(grid), prod(grid))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, prod(grid)))
    assert ((weights > 0).sum(-1) == 9).all()
    v = x.unflatten(-1, (3, 2, 4))[..., 2, :, :].flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close((weights @ v).transpose(1, 2).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("kernel", "dilation", "bias", "message"),
    [
        (7, 2, None, "axis of 9 under kernel 7 x dilation 2: pad it to 14"),
        ((3, 3, 3), 1, None, "give one positive number, or one an axis"),
        (3, 0, None, "give one positive number"),
        (3, 1, torch.zeros(2, 5, 3), "bias of shape"),
    ],
)
def test_misuse_is_one_clear_line(kernel: int | Axes, dilation: int, bias: Tensor | None, message: str) -> None:
    x = torch.zeros(1, 16, 9, 2, 4)
    with pytest.raises(SaccadeError, match=message):
        neighborhood_attention(x, x, x, kernel, dilation, bias)
    with pytest.raises(SaccadeError, match="stride 4 over kernel 3"):
        neighborhood_attention(x, x, x, 3, stride=4)


def test_shapes_must_agree() -> None:
    x = torch.zeros(1, 16, 9, 2, 4)
    with pytest.raises(SaccadeError, match="give all three as"):
        neighborhood_attention(x, x[:, :8], x, 3)
