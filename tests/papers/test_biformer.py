"""Bi-level routing attention against slow loops, and what its docstrings promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.papers.biformer import (
    CARD,
    BiLevelRouting,
    EnhancedAttention,
    LatePaddedRouting,
    SoftRouting,
    biformer,
    biformer_stl,
)

GRIDS = [(6, 9), (7, 11), (1, 5), (2, 2), (13,), (4, 3, 5)]


def made(kind=BiLevelRouting, grid=(6, 6), dim=8, heads=2, **options):
    torch.manual_seed(0)
    module = kind(Site(dim, heads, grid=grid), **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def image_of(grid, batch=1, dim=8, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, *grid, dim, dtype=torch.float64)


def slow(module, x, grid, side, inside):
    """One image: token by token, region by region. `inside` says which tokens count in a region's mean."""
    dim, heads = module.dim, module.heads
    q, k, v = x["q"], x["k"], x["v"]
    regions: dict = {}
    for place in q:
        regions.setdefault(tuple(at // part for at, part in zip(place, side)), []).append(place)
    mean = {what: {region: sum(source[place] for place in places if inside(place)) / sum(map(inside, places))
                   for region, places in regions.items()} for what, source in (("q", q), ("k", k))}
    out = {}
    for region, places in regions.items():
        scores = sorted(regions, key=lambda other: -float(mean["q"][region] @ mean["k"][other]))
        keys = [place for chosen in scores[:module.topk] for place in regions[chosen]]
        for place in places:
            result = []
            for head in range(heads):
                part, wide = slice(head * len(q[place]) // heads, (head + 1) * len(q[place]) // heads), dim // heads
                logits = torch.stack([module.scale * (q[place][part] @ k[key][part]) for key in keys])
                weights = logits.softmax(0)
                result.append(sum(w * v[key][head * wide : (head + 1) * wide] for w, key in zip(weights, keys)))
            out[place] = torch.cat(result)
    return torch.stack([out[place] for place in product(*map(range, grid))])


def tokens_of(qkv, qk_dim):
    places = list(product(*map(range, qkv.shape[:-1])))
    pieces = zip("qkv", qkv.split((qk_dim, qk_dim, qkv.shape[-1] - 2 * qk_dim), -1))
    return {what: {place: value[place] for place in places} for what, value in pieces}


def zero_padded(x, full):
    return F.pad(x, [0, 0, *(n for size, to in reversed(list(zip(x.shape[:-1], full))) for n in (0, to - size))])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("options", [dict(topk=2), dict(topk=1, qk_dim=4, kernel=3), dict(topk=99)])
def test_routing_equals_loops(grid, options):
    """Zero-padded before qkv; padded tokens count in means, keys and the convolution."""
    module = made(grid=grid, regions=3, **options)
    x = image_of(grid)
    full = tuple(size + -size % 3 for size in grid)
    with torch.no_grad():
        padded = zero_padded(x[0], full)
        qkv = module.qkv(padded)
        side = tuple(size // 3 for size in full)
        wanted = slow(module, tokens_of(qkv, module.qk_dim), full, side, lambda place: True).view(*full, 8)
        wanted = module.proj(wanted + module.local(qkv[None, ..., 2 * module.qk_dim :])[0])
        wanted = wanted[tuple(slice(size) for size in grid)]
        torch.testing.assert_close(module(x)[0], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
def test_late_padding_equals_loops(grid):
    """Regions of floor(size / 3); padded after qkv: in no mean, keys of zeros, not in the convolution."""
    module = made(LatePaddedRouting, grid=grid, regions=3, topk=2)
    x = image_of(grid)
    side = tuple(max(size // 3, 1) for size in grid)
    full = tuple(-(-size // part) * part for size, part in zip(grid, side))
    with torch.no_grad():
        qkv = module.qkv(x[0])
        real = {place for place in product(*map(range, grid))}
        tokens = tokens_of(zero_padded(qkv, full), 8)
        wanted = slow(module, tokens, full, side, lambda place: place in real).view(*full, 8)
        wanted = wanted[tuple(slice(size) for size in grid)]
        wanted = module.proj(wanted + module.local(qkv[None, ..., 16:])[0])
        torch.testing.assert_close(module(x)[0], wanted, rtol=1e-10, atol=1e-10)


def test_both_paddings_agree_where_nothing_is_padded():
    x = image_of((6, 9), batch=2)
    early, late = made(regions=3, topk=2), made(LatePaddedRouting, regions=3, topk=2)
    torch.testing.assert_close(early(x), late(x), rtol=1e-10, atol=1e-10)


def test_late_padding_keeps_images_apart():
    module, x = made(LatePaddedRouting, regions=3, topk=2), image_of((7, 5), batch=3)
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]), rtol=1e-10, atol=1e-10)


def test_all_regions_are_full_attention():
    """With every region chosen, level two is plain attention, scaled by the whole width."""
    module, x = made(regions=2, topk=4), image_of((4, 6), batch=2)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    out = ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    wanted = module.proj(out + module.local(module.qkv(x)[..., 16:]))
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


def test_full_attention_convolves_the_input():
    for of_values in (False, True):
        module = made(EnhancedAttention, heads=1, dim=16, of_values=of_values)
        x = image_of((3, 5), batch=2, dim=16)
        q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 8, 2)).permute(2, 0, 3, 1, 4)
        out = ((q @ k.mT * 2**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        wanted = module.proj(out + module.local(module.qkv(x)[..., 32:] if of_values else x))
        torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


def test_soft_routing_weights_the_regions():
    """One region kept: its weight is 1, so that soft equals hard. Two kept: it differs, and the router learns."""
    x = image_of((6, 6), batch=2)
    hard, soft = made(regions=3, topk=1), made(SoftRouting, regions=3, topk=1)
    torch.testing.assert_close(soft(x), hard(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(made(SoftRouting, regions=3, topk=2)(x), made(regions=3, topk=2)(x))
    learned = made(SoftRouting, regions=3, topk=2, learned=True)
    learned(x).square().sum().backward()
    assert learned.router.weight.grad.abs().max() > 0


def test_only_differentiable_scores_carry_a_gradient():
    x = image_of((6, 6))
    gradients = []
    for differentiable in (False, True):
        module = made(SoftRouting, regions=3, topk=2, differentiable=differentiable)
        module(x).square().sum().backward()
        gradients.append(module.qkv.weight.grad)
    torch.testing.assert_close(gradients[0][16:], gradients[1][16:], rtol=1e-9, atol=1e-9)  # v does not choose
    assert not torch.allclose(gradients[0][:16], gradients[1][:16])


def test_pooled_keys():
    """Pooling regions of 2x2 tokens to one: every chosen region is one key, its mean."""
    module, x = made(regions=3, topk=9, pool=nn.AvgPool2d(2)), image_of((6, 6))
    q, k, v = module.qkv(x).split(8, -1)
    k, v = (F.avg_pool2d(part.movedim(-1, 1), 2).flatten(2).mT for part in (k, v))
    heads = [part.flatten(1, -2).unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, scale=8**-0.5).transpose(1, 2).reshape(x.shape)
    wanted = module.proj(out + module.local(module.qkv(x)[..., 16:]))
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [BiLevelRouting, LatePaddedRouting])
def test_recorded_weights_stand_on_the_grid(kind):
    """A token's weights sum to one and lie in exactly `topk` regions."""
    module, x = made(kind, regions=3, topk=2), image_of((6, 9), batch=2)
    model = nn.Sequential(module)
    with record(model) as watched, torch.no_grad():
        model(x)
    dense = watched["0"].dense(batch=2)
    assert dense.shape == (2, 2, 54, 54)
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, 2, 54, dtype=torch.float64))
    looked = (dense > 0).view(2, 2, 54, 3, 2, 3, 3).any(4).any(-1).flatten(-2)
    assert (looked.sum(-1) == 2).all()


@pytest.mark.parametrize("kind", [BiLevelRouting, SoftRouting, LatePaddedRouting])
@pytest.mark.parametrize("options", [dict(), dict(qk_dim=4), dict(pool=nn.AvgPool2d(2))])
def test_cost(kind, options):
    if kind is SoftRouting:
        options = options | dict(learned=True)
    for grid in ((12, 18), (12, 12)) if kind is not LatePaddedRouting else ((12, 18), (13, 20)):
        module = made(kind, grid=grid, regions=3, topk=2, **options)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), record(nn.Sequential(module)), counter:
            module(image_of(grid))
        assert module.cost(Site(8, 2, grid=grid), grid) == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", CARD.params)
def test_parameters_of_the_paper(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(CARD.params[name], rel=0.01)


@pytest.mark.parametrize("name", CARD.macs)
def test_multiply_adds_of_the_paper(name):
    with torch.device("meta"):
        model, counter = create_model(name).eval(), FlopCounterMode(display=False)
        with torch.no_grad(), record(model), counter:
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(CARD.macs[name], rel=0.01)


@pytest.mark.parametrize("builder", [biformer, biformer_stl])
@pytest.mark.parametrize("size", [(224, 224), (97, 61), (3, 5)])
def test_any_image(builder, size):
    """Sizes that no region divides, and some smaller than a patch."""
    model = builder((16, 16, 16, 16), (1, 1, 1, 1), num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.slow
def test_late_padding_exports_once():
    module = made(LatePaddedRouting, regions=3, topk=2).float()
    sides = {1: torch.export.Dim("height", min=6, max=64), 2: torch.export.Dim("width", min=6, max=64)}
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(module, (torch.randn(2, 10, 13, 8),), dynamic_shapes=(sides,), strict=False)
        for grid in [(10, 13), (9, 12), (7, 17)]:
            x = torch.randn(2, *grid, 8)
            torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


def test_wrong_numbers_are_named():
    with pytest.raises(SaccadeError, match="3 heads do not divide 8 channels"):
        create_mixer("bilevel_routing", Site(8, 3))
    with pytest.raises(SaccadeError, match="4 heads do not divide 6 channels"):
        create_mixer("bilevel_routing", Site(8, 4), qk_dim=6)
    with pytest.raises(SaccadeError, match="topk=0"):
        create_mixer("bilevel_routing", Site(8, 2), topk=0)
