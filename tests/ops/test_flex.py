"""Every pattern three ways: loops in float64, a whole mask, FlexAttention (on this machine without gradient)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade import SaccadeError, Site, create_mixer, record
from saccade.ops import flex, prefer, reference
from saccade.ops.flex import flex_attend
from saccade.ops.neighborhood import Window, neighborhood_attention
from saccade.ops.pattern import Disc, Everywhere, Neighborhood, Paths, Pattern, Ring, Windows, written_out

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
Place = tuple[int, ...]


def neighbourhood(grid: Place, windows: tuple[Window, ...]) -> tuple[Pattern, Callable[[Place, Place], bool]]:
    def sees(i: Place, j: Place) -> bool:
        return all(to in reference.neighbours(at, size, *window)
                   for at, to, size, window in zip(i, j, grid, windows, strict=True))
    return Neighborhood(grid, windows), sees


def windows(grid: Place, window: Place, shift: Place) -> tuple[Pattern, Callable[[Place, Place], bool]]:
    def sees(i: Place, j: Place) -> bool:
        return all(at in range(begin, begin + side) and to in range(begin, begin + side) for at, to, begin, side in
                   ((at, to, next(start for start in range(late - side, at + 1, side) if at < start + side), side)
                    for at, to, side, late in zip(i, j, window, shift, strict=True)))
    return Windows(grid, window, shift), sees


def ring(grid: Place, kernel: Place, dilation: Place) -> tuple[Pattern, Callable[[Place, Place], bool]]:
    def sees(i: Place, j: Place) -> bool:
        return all(to in [(at + e * (step - k // 2)) % size for step in range(k)]
                   for at, to, size, k, e in zip(i, j, grid, kernel, dilation, strict=True))
    return Ring(grid, kernel, dilation), sees


def disc(grid: Place, square: int) -> tuple[Pattern, Callable[[Place, Place], bool]]:
    return Disc(grid, square), lambda i, j: sum((to - at) ** 2 for at, to in zip(i, j, strict=True)) <= square


PATTERNS = {
    "neighborhood": neighbourhood((9, 7), (Window(5, 1), Window(3, 1))),
    "even kernels, dilated, strided, causal": neighbourhood((11, 13), (Window(4, 2, 2), Window(3, 3, 1, True))),
    "a long sequence": neighbourhood((150,), (Window(7, 4, 3),)),
    "a volume": neighbourhood((3, 5, 7), (Window(3, 1, 1, True), Window(2, 2), Window(3, 1, 3))),
    "windows": windows((8, 6), (4, 3), (0, 0)),
    "shifted windows": windows((9, 8), (4, 4), (2, 2)),
    "rings": ring((8, 9), (5, 3), (1, 2)),
    "rings with classes": ring((12, 8), (3, 4), (4, 2)),
    "disc": disc((7, 9), 8),
    "ball": disc((4, 5, 3), 3),
    "everywhere": (Everywhere((5, 4)), lambda i, j: True),
}


def draw(pattern: Pattern, heads: int = 2, dim: int = 4, batch: int = 1) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    N = torch.Size(pattern.grid).numel()
    return list(torch.randn(3, batch, heads, N, dim).unbind()), torch.randn(heads, *pattern.sides())


def offset(pattern: Pattern, i: Place, j: Place) -> Place:
    """Where a literal reader would look into the bias: key - query in steps, the short way around a ring."""
    steps = []
    for axis, (at, to, size, side) in enumerate(zip(i, j, pattern.grid, pattern.sides(), strict=True)):
        if isinstance(pattern, Ring):
            k, e = pattern.kernel[axis], pattern.dilation[axis]
            steps.append(next(s - k // 2 for s in range(k) if (at + e * (s - k // 2)) % size == to) + side // 2)
        else:
            dilation = pattern.windows[axis].dilation if isinstance(pattern, Neighborhood) else 1
            steps.append((to - at) // dilation + side // 2)
    return tuple(steps)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's own unfused form: the same arithmetic, without a third of a minute of compiling."""
    monkeypatch.setattr(flex, "_compiled", lambda device: flex.flex_attention)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfused again, traced: the gradient that a GPU compiles. On a CPU a check alone stands before it."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_compiled", lambda device: flex.flex_attention)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_all_paths_agree_with_the_loops(name: str, with_bias: bool, uncompiled: None) -> None:
    pattern, sees = PATTERNS[name]
    (q, k, v), table = draw(pattern)
    bias = table if with_bias else None

    def look_up(b: int, h: int, i: Place, j: Place) -> float:
        return float(table[(h, *offset(pattern, i, j))])

    expected = reference.pattern_attention(q, k, v, pattern.grid, sees, look_up if with_bias else None)
    masked = flex_attend(q, k, v, pattern, bias)
    torch.testing.assert_close(masked.double(), expected, rtol=0, atol=1e-5)
    with prefer("flex"):
        torch.testing.assert_close(flex_attend(q, k, v, pattern, bias).double(), expected, rtol=0, atol=1e-5)
    double = flex_attend(q.double(), k.double(), v.double(), pattern, None if bias is None else bias.double())
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-12)


def steps_of(grid: Place, batch: int = 2, heads: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.rand(batch, heads, *grid) for _ in grid]


@pytest.mark.parametrize("grid", [(6,), (5, 4), (3, 2, 4)])
@pytest.mark.parametrize("forth", [True, False])
def test_paths_are_walked_step_by_step(grid: Place, forth: bool, uncompiled: None) -> None:
    costs, pattern = steps_of(grid), Everywhere(grid)
    (q, k, v), _ = draw(pattern, batch=2)
    walk = tuple(range(len(grid))) if forth else None

    def fade(b: int, h: int, i: Place, j: Place) -> float:
        here, total = list(i), 0.0
        for axis in walk or reversed(range(len(grid))):
            while here[axis] != j[axis]:
                ahead = here[axis] < j[axis]
                here[axis] += ahead
                total += float(costs[axis][(b, h, *here)])  # the step into a place costs what stands there
                here[axis] -= not ahead
        return -total

    expected = reference.pattern_attention(q, k, v, grid, lambda i, j: True, fade)
    bias = Paths(tuple(cost.cumsum(2 + axis) for axis, cost in enumerate(costs)), walk)
    torch.testing.assert_close(flex_attend(q, k, v, pattern, bias).double(), expected, rtol=0, atol=1e-5)
    with prefer("flex"):
        torch.testing.assert_close(flex_attend(q, k, v, pattern, bias).double(), expected, rtol=0, atol=1e-5)


def test_paths_inside_a_pattern_of_another_order(uncompiled: None) -> None:
    """Tokens sorted by residue class keep their places on the path."""
    grid = (8, 6)
    pattern = Neighborhood(grid, (Window(3, 2), Window(2, 3)))
    sums = [cost.cumsum(2 + axis) for axis, cost in enumerate(steps_of(grid))]
    (q, k, v), _ = draw(pattern, batch=2)
    with prefer("flex"):
        out = flex_attend(q, k, v, pattern, Paths(tuple(sums)))
    torch.testing.assert_close(out, flex_attend(q, k, v, pattern, Paths(tuple(sums))))


def test_neighborhood_attention_by_flex(uncompiled: None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 13, 12, 3, 2, 8).unbind(-3)
    bias, how = torch.randn(2, 7, 9), dict(stride=(2, 1), causal=(False, True), scale=0.4)
    expected = neighborhood_attention(q, k, v, (4, 5), (3, 2), bias, **how)
    with prefer("flex"):
        torch.testing.assert_close(neighborhood_attention(q, k, v, (4, 5), (3, 2), bias, **how), expected)
    with prefer("reference"):
        torch.testing.assert_close(neighborhood_attention(q, k, v, (4, 5), (3, 2), bias, **how), expected)


def test_windows_are_those_of_swin(uncompiled: None) -> None:
    """A shifted window mixer, taken apart, and its attention computed on the whole grid."""
    mixer = create_mixer("shifted_window", Site(16, 2, index=1, grid=(8, 12)), window=4)
    x = torch.randn(2, 8, 12, 16)
    with torch.no_grad():
        table = mixer.bias.table.copy_(torch.randn(49, 2)).T.view(2, 7, 7).flip(1, 2)  # its offsets are query - key
        q, k, v = mixer.qkv(x).view(2, 96, 3, 2, 8).permute(2, 0, 3, 1, 4)
        expected = mixer(x)
        for path in ("eager", "flex"):
            with prefer(path):
                out = flex_attend(q, k, v, Windows((8, 12), (4, 4), (2, 2)), table)
            torch.testing.assert_close(mixer.proj(out.transpose(1, 2).reshape(x.shape)), expected)


def test_inside_a_ring_is_inside_a_neighborhood() -> None:
    grid, windows_ = (14, 15), (Window(5, 1), Window(3, 1))
    (q, k, v), bias = draw(Neighborhood(grid, windows_))
    open_, closed = (flex_attend(q, k, v, pattern, bias).unflatten(2, grid)
                     for pattern in (Neighborhood(grid, windows_), Ring(grid, (5, 3), (1, 1))))
    torch.testing.assert_close(closed[:, :, 2:-2, 1:-1], open_[:, :, 2:-2, 1:-1])
    assert (closed - open_).abs().amax((0, 1, 4))[0].min() > 1e-3


def test_a_ring_turns_with_its_tokens() -> None:
    pattern = Ring((12, 9), (4, 3), (2, 3))
    qkv, bias = draw(pattern)
    turned = [x.unflatten(2, (12, 9)).roll((5, 2), (2, 3)).flatten(2, 3) for x in qkv]
    expected = flex_attend(*qkv, pattern, bias).unflatten(2, (12, 9)).roll((5, 2), (2, 3)).flatten(2, 3)
    torch.testing.assert_close(flex_attend(*turned, pattern, bias), expected)


def test_blocks_hold_what_is_seen_and_little_else() -> None:
    """Block masks against all pairs; dilation costs no blocks, because its classes stand together."""
    for pattern in (Neighborhood((23, 21), (Window(7, 1), Window(5, 1))),
                    Neighborhood((24, 24), (Window(3, 4), Window(3, 4))), Disc((20, 20), 10),
                    Ring((20, 20), (3, 3), (5, 5)), Windows((20, 20), (4, 4), (2, 2))):
        N = torch.Size(pattern.grid).numel()
        seen = written_out(pattern, None, torch.float32, torch.device("cpu")) == 0
        order, _ = flex._orders(pattern, torch.device("cpu"))
        seen = seen if order is None else seen[order][:, order]
        blocks = -(-N // 128)
        padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
        padded[:N, :N] = seen
        padded = padded.view(blocks, 128, blocks, 128)
        mask = flex._block_mask(pattern, torch.device("cpu"))
        assert torch.equal(mask.to_dense()[0, 0].bool(), padded.any(3).any(1))
        full = padded.all(3).all(1)
        assert torch.equal(mask.full_kv_num_blocks[0, 0].long(), full.sum(1))
    wide = Neighborhood((64, 64), (Window(7, 8), Window(7, 8)))
    assert flex._block_mask(wide, torch.device("cpu")).sparsity() > 90


@pytest.mark.parametrize("pattern", [Neighborhood((7, 6), (Window(3, 2), Window(4, 1))), Ring((6, 7), (3, 4), (2, 1)),
                                     Disc((6, 7), 5)])
def test_gradients_of_offsets(pattern: Pattern, differentiable: None) -> None:
    (q, k, v), bias = draw(pattern)
    check_gradients(pattern, q, k, v, bias)


def under_a_mask(*args: Any) -> Tensor:
    with prefer("eager"):
        return flex_attend(*args)


def check_gradients(pattern: Pattern, *leaves: Tensor, tolerance: float = 1e-5) -> None:
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, k, v, *factors = leaves
    outputs = []
    for attend in (under_a_mask, flex.flex_kernel):
        bias = factors[0] if len(factors) == 1 else Paths(tuple(factors))
        out = attend(q, k, v, pattern, bias)
        cotangent = torch.linspace(0, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        outputs.append(torch.autograd.grad(out, leaves, cotangent))
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def test_gradients_of_paths(differentiable: None) -> None:
    pattern = Everywhere((4, 5))
    (q, k, v), _ = draw(pattern, batch=2)
    check_gradients(pattern, q, k, v, *(x.cumsum(2 + a) for a, x in enumerate(steps_of((4, 5)))))


def test_recorded_weights_stand_between_tokens() -> None:
    pattern = Disc((5, 6), 4)

    class Local(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return flex_attend(x, x, x, pattern)

    model, x = torch.nn.Sequential(Local()), torch.randn(2, 2, 30, 4)
    with record(model) as r, prefer("flex"):  # watched, whatever is preferred
        out = model(x)
    weights = r["0"].dense(batch=2)
    torch.testing.assert_close(weights @ x, out)
    assert torch.equal(weights[0, 0] > 0, written_out(pattern, None, x.dtype, x.device) == 0)


def test_compiles_and_exports_under_a_mask() -> None:
    class Local(torch.nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return flex_attend(x, x, x, Neighborhood((6, 7), (Window(3, 2), Window(5, 1))), bias)

    model, x, bias = Local(), torch.randn(2, 2, 42, 4), torch.randn(2, 5, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bias), model(x, bias))
    exported = torch.export.export(model, (x, bias), dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, None)).module()
    torch.testing.assert_close(exported(x[:1], bias), model(x[:1], bias))


@pytest.mark.parametrize("kind", [
    pytest.param("none", marks=pytest.mark.slow), "offsets", pytest.param("paths", marks=pytest.mark.slow),
])
def test_sizes_are_left_open_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would be asked to compile there, up to its kernels: three graphs (the first two sizes, and the first
    other number of blocks) for any number of sizes, kernels, dilations and walks.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    open_ = flex._compiled.__wrapped__("cuda")
    monkeypatch.setattr(flex, "_compiled", lambda device: open_)
    for number, grid in enumerate([(12, 15), (15, 13), (9, 31), (20, 10), (21, 19)]):
        pattern = Neighborhood(grid, (Window(3 + number, 1), Window(3, 2 + number % 2)))
        (q, k, v), table = draw(pattern)
        sums = tuple(cost.cumsum(2 + axis) for axis, cost in enumerate(steps_of(grid, batch=1)))
        bias = {"none": None, "offsets": table, "paths": Paths(sums, ((0, 1), (1, 0))[number % 2])}[kind]
        torch.testing.assert_close(flex.flex_kernel(q, k, v, pattern, bias), flex_attend(q, k, v, pattern, bias))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow  # a kernel compiles for 20 s, the first in a fresh cache for a minute
def test_compiled_and_one_kernel_for_all_patterns() -> None:
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for pattern in (Neighborhood((12, 15), (Window(5, 1), Window(3, 2))),
                    Neighborhood((15, 12), (Window(3, 4), Window(7, 1, 2))), Windows((18, 10), (4, 4), (2, 2)),
                    Ring((20, 9), (5, 3), (2, 1))):
        (q, k, v), _ = draw(pattern, dim=16)
        with prefer("flex"):
            out = flex_attend(q, k, v, pattern)
        torch.testing.assert_close(out, flex_attend(q, k, v, pattern), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("pattern", "bias", "message"), [
    (Everywhere((5, 5)), None, r"give all three as \(B, heads, 25, d\) for grid \(5, 5\)"),
    (Disc((5, 6), 4), torch.zeros(2, 5, 3), r"bias of shape \(2, 5, 3\): give \(2, 5, 5\)"),
    (Everywhere((5, 6)), Paths((torch.zeros(1, 2, 5, 6),)), r"give 2 of shape \(1, 2, 5, 6\), one an axis"),
    (Ring((5, 6), (3, 4), (1, 3)), None, "ring of 6 under kernel 4 x dilation 3: it closes after 2 steps"),
    (Neighborhood((5, 6), (Window(3, 1), Window(4, 2))), None, "axis of 6 under kernel 4 x dilation 2: pad it to 8"),
    (Windows((5, 6), (2, 3), (1, 3)), None, "shift 3 of windows of 3: give 0 to 2"),
])
def test_misuse_is_one_clear_line(pattern: Pattern, bias: Tensor | None, message: str) -> None:
    x = torch.zeros(1, 2, 30, 4)
    with pytest.raises(SaccadeError, match=message):
        flex_attend(x, x, x, pattern, bias)


def test_settings_are_given_one_an_axis() -> None:
    with pytest.raises(SaccadeError, match=r"window \(4,\) on a grid of 2 axes: give one an axis"):
        Windows((5, 6), (4,), (2, 2))


@gpu
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    pattern, _ = PATTERNS[name]
    (q, k, v), bias = draw(pattern, dim=32, batch=2)
    q, k, v, bias = (x.to("cuda", dtype) for x in (q, k, v, bias))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(flex.flex_kernel(q, k, v, pattern, bias), under_a_mask(q, k, v, pattern, bias),
                               rtol=tolerance, atol=tolerance)
    check_gradients(pattern, q, k, v, bias, tolerance=tolerance)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "dilation", "stride"), [(7, 1, 1), (7, 4, 1), (4, 2, 2)])
def test_neighborhood_attention_on_a_gpu(kernel: int, dilation: int, stride: int, dtype: torch.dtype) -> None:
    """Whichever of the fast paths are here, against the tiles in float32; the shape of NAT's first stage."""
    leaves = [x.requires_grad_() for x in torch.randn(3, 2, 56, 56, 4, 32, device="cuda").unbind()]
    expected, gradients = None, None
    for path in ("eager", "flex", "natten"):
        try:
            with prefer(path):
                cast = [x.to(torch.float32 if path == "eager" else dtype) for x in leaves]
                out = neighborhood_attention(*cast, kernel, dilation, stride=stride).float()
        except SaccadeError:
            assert path == "natten"  # not installed, or not for this type
            continue
        found = torch.autograd.grad(out.square().sum(), leaves)
        if expected is None:
            expected, gradients = out, found
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found, gradients, rtol=2 * tolerance, atol=2 * tolerance)


@gpu
def test_no_n_by_n_numbers_on_a_gpu() -> None:
    grid = (96, 96)
    q, k, v = torch.randn(3, 1, 2, 96 * 96, 32, device="cuda", dtype=torch.bfloat16).unbind()
    sums = tuple(torch.rand(1, 2, *grid, device="cuda", dtype=torch.bfloat16).cumsum(2 + axis) for axis in (0, 1))
    flex_attend(q, k, v, Everywhere(grid), Paths(sums))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flex_attend(q, k, v, Everywhere(grid), Paths(sums))
    assert torch.cuda.max_memory_allocated() - before < 20 * q.nbytes < (96 * 96) ** 2


def test_all_pairs_of_small_grids() -> None:
    """What is seen, exhaustively: every grid up to 6 x 5 under every window that fits."""
    for grid in product(range(1, 7), range(1, 6)):
        for kernel in product(range(1, grid[0] + 1), range(1, grid[1] + 1)):
            pattern, sees = neighbourhood(grid, tuple(Window(side, 1) for side in kernel))
            seen = written_out(pattern, None, torch.float32, torch.device("cpu")) == 0
            places = list(product(*map(range, grid)))
            assert seen.tolist() == [[sees(i, j) for j in places] for i in places]
