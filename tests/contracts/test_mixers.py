"""The same questions put to every token mixer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from saccade import Site, record
from saccade.core.record import Affinity, Part
from tests.contracts.registered import GRIDS, MIXERS, mixer, over


@pytest.mark.parametrize("grid", GRIDS)
@over("test_any_grid", MIXERS)
def test_any_grid(name, grid):
    """Same shape, contiguous, finite, on prime, odd, 1-wide and non-square grids, whatever the native one."""
    module = mixer(name)
    x = torch.randn(2, *grid, 32)
    with torch.no_grad():
        out = module(x)
    assert out.shape == x.shape and out.is_contiguous() and out.isfinite().all()


@over("test_batch_elements_do_not_meet", MIXERS)
def test_batch_elements_do_not_meet(name):
    module = mixer(name).double()
    x = torch.randn(3, 7, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        together = module(x)
        for number in range(3):
            torch.testing.assert_close(together[number:number + 1], module(x[number:number + 1]), rtol=1e-9, atol=1e-9)


@over("test_every_parameter_learns", MIXERS)
def test_every_parameter_learns(name):
    module = mixer(name).train()
    x = torch.randn(2, 9, 7, 32, requires_grad=True)
    (module(x) * torch.randn(2, 9, 7, 32)).sum().backward()
    for parameter_name, parameter in [("x", x), *module.named_parameters()]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, parameter_name


@over("test_float64_agrees_with_float32", MIXERS)
def test_float64_agrees_with_float32(name):
    module = mixer(name)
    x = torch.randn(2, 8, 8, 32)
    with torch.no_grad():
        single, double = module(x), module.double()(x.double())
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@over("test_autocast_is_finite", MIXERS)
def test_autocast_is_finite(name):
    module = mixer(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 9, 7, 32)).isfinite().all()


@over("test_all_of_it_in_bfloat16", MIXERS)
def test_all_of_it_in_bfloat16(name, monkeypatch):
    """Weights and input in half precision: so comes the output; a bias of another type GPUs would refuse."""
    fused, wrong = F.scaled_dot_product_attention, []

    def watched(q, k, v, attn_mask=None, **settings):
        wrong.extend([] if attn_mask is None or attn_mask.dtype in (torch.bool, q.dtype) else [attn_mask.dtype])
        return fused(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        out = mixer(name).bfloat16()(torch.randn(2, 9, 7, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all() and not wrong


@over("test_state_dict_round_trip", MIXERS)
def test_state_dict_round_trip(name):
    module, other = mixer(name), mixer(name)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(module.state_dict())
    x = torch.randn(1, 8, 8, 32)
    with torch.no_grad():
        assert torch.equal(module(x), other(x))


@over("test_evaluation_is_deterministic", MIXERS)
def test_evaluation_is_deterministic(name):
    module, x = mixer(name), torch.randn(2, 9, 7, 32)
    with torch.no_grad():
        assert torch.equal(module(x), module(x))


# Tiles compute masked pairs too: their declared cost is proven by the goldens' counts (tests/test_goldens.py) alone.
TILED = {"neighborhood", "fused_neighborhood", "scrambled_neighborhood"}


@over("test_declared_cost", MIXERS)
def test_declared_cost(name):
    """Declared multiply-adds against those counted on the explicit form, on a grid that every window divides."""
    module, grid = mixer(name, grid=(56, 56)), (56, 56)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), record(module_in(module)), counter:  # watched: softmax attention in its explicit form
        module(torch.randn(1, *grid, 32))
    site = Site(32, 2, 1, 1, 8, grid)
    declared = module.cost(site, grid) + (module.shared_cost(site, grid) if hasattr(module, "shared_cost") else 0)
    if name in TILED:
        assert 0.3 < 2 * declared / counter.get_total_flops() < 1
        return
    assert declared == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def module_in(module: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(module)


@over("test_declared_reach", MIXERS)
def test_declared_reach(name):
    """Nothing outside the declared reach moves, something on its border does; global reach shows at the far corner."""
    grid = (27, 29)
    module = mixer(name, grid=grid).double()
    site = Site(32, 2, 1, 1, 8, grid)
    x = torch.randn(1, *grid, 32, dtype=torch.float64)
    reach = module.reach(site)
    largest, border, outside, corner = 0.0, False, 0.0, 0.0
    for place in [(13, 14), (0, 0), (26, 28), (6, 7), (7, 6), (20, 21), (13, 0), (0, 14), (3, 4), (10, 11), (24, 24)]:
        moved = x.clone()
        moved[0, place[0], place[1]] += torch.randn(32, dtype=torch.float64)
        with torch.no_grad():
            change = (module(moved) - module(x)).abs().amax(-1)[0]
        largest = max(largest, float(change.max()))
        rows = (torch.arange(grid[0]) - place[0]).abs()[:, None].expand(grid)
        columns = (torch.arange(grid[1]) - place[1]).abs()[None].expand(grid)
        if reach is None:
            corner = max(corner, float(change[26 if place[0] < 13 else 0, 28 if place[1] < 14 else 0]))
            continue
        beyond = (rows > reach[0]) | (columns > reach[1])
        outside = max(outside, float(change[beyond].max()) if beyond.any() else 0.0)
        border |= bool((change[((rows == reach[0]) | (columns == reach[1])) & ~beyond] > 1e-9 * largest).any())
    if reach is None:
        assert corner > 1e-9 * largest
    else:
        assert outside <= 1e-9 * largest
        assert border


@over("test_recording_changes_nothing", MIXERS)
def test_recording_changes_nothing(name):
    """The watched forward gives the same numbers; where softmax weights stand between tokens, each softmax that a
    token asks in adds one to its row, of which padding may have its part.
    """
    module = torch.nn.Sequential(mixer(name)).double()
    x = torch.randn(2, 9, 10, 32, dtype=torch.float64)
    with torch.no_grad():
        plain = module(x)
        with record(module) as r:
            watched = module(x)
    torch.testing.assert_close(plain, watched, rtol=1e-9, atol=1e-9)
    if getattr(module[0], "weights", False):
        affinity = r["0"]
        assert affinity.parts
        if affinity.placed:
            dense = affinity.dense(batch=2)
            assert dense.shape[-2:] == (90, 90) and dense.min() >= 0 and dense.sum(-1).min() > 0
            shown = [Part(part.weights, part.query, part.key.where(part.key >= 0, 90)) for part in affinity.parts]
            rows = Affinity(shown).dense(batch=2)[..., :90, :].sum(-1)  # with padding as one more token
            torch.testing.assert_close(rows, rows.round(), rtol=0, atol=1e-9)
            assert rows.min() > 0.5 and rows.max() < len(affinity.parts) + 0.5


COMPILED = MIXERS[:: max(len(MIXERS) // 5, 1)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in COMPILED else pytest.mark.slow)
                                  for name in MIXERS])
def test_compiles_whole(name):
    module, x = mixer(name), torch.randn(1, 9, 10, 32)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
