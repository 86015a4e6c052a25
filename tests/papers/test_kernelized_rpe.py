"""Kernelized attention with relative positions: transforms against pairs, what it tends to, what it cannot see."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, record
from saccade.ops import toeplitz
from saccade.papers import kernelized_rpe
from saccade.papers.kernelized_rpe import KernelizedRelative, by_pairs, by_transform
from tests.contracts.registered import randomised


def made(grid, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return randomised(KernelizedRelative(Site(16, 2, grid=grid), **options)).to(dtype).eval()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(1,), (7,), (16,), (3, 5), (1, 4), (2, 3, 4)])
def test_transforms_equal_the_sums_in_a_loop(grid, causal, monkeypatch):
    """Float64, an asymmetric table, and both forms in one piece and in several."""
    if causal and len(grid) > 1:
        with pytest.raises(SaccadeError, match="causal"):
            made(grid, causal=True)
        return
    mixer = made(grid, causal=causal)
    q, k = torch.rand(2, 2, *grid, 5, dtype=torch.float64), torch.rand(2, 2, *grid, 5, dtype=torch.float64)
    v, factor = torch.randn(2, 2, *grid, 8, dtype=torch.float64), mixer.factor(grid)
    q, k, v = (each.flatten(2, -2) for each in (q, k, v))
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))
    wanted = torch.zeros_like(v)
    for i, here in enumerate(places):
        weights = torch.stack([factor[(slice(None), *(there - here + torch.tensor(grid) - 1))] for there in places], -1)
        weights = weights * (q[:, :, i, None] * k).sum(-1)
        wanted[:, :, i] = (weights[..., None] * v).sum(2) / weights.sum(-1, keepdim=True)
    for whole in (2**20, 1):
        for module in (kernelized_rpe, toeplitz):
            monkeypatch.setattr(module, "WHOLE", whole)
        with torch.no_grad():
            torch.testing.assert_close(by_transform(q, k, v, factor, grid), wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(by_pairs(q, k, v, factor, grid), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", [(300,), (20, 17)])
def test_transforms_agree_with_pairs_in_single_precision(grid):
    """To 1e-5 of the largest value, which is what the paper's algorithm promises of its quadratic form."""
    mixer, x = made(grid, torch.float32), torch.randn(2, *grid, 16)
    found = []
    for method in ("pairs", "fft"):
        mixer.method = method
        found.append(mixer(x))
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()


def test_many_features_are_softmax_attention_with_a_bias():
    """Monte Carlo: the error falls as the root of their number, and on small inputs it starts small."""
    mixer = made((9,), features=2**14, normalise=False)
    x = torch.randn(1, 9, 16, dtype=torch.float64) / 2
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    offset = torch.arange(9) - torch.arange(9)[:, None] + 8
    weights = (q @ k.mT / 8**0.5 + mixer.bias[:, offset]).softmax(-1)
    wanted = mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(mixer(x), wanted, rtol=0.05, atol=0.05)


def test_lengths_of_queries_and_a_constant_in_the_bias_change_nothing():
    mixer, x = made((4, 3)), torch.randn(2, 4, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = mixer(x)
        mixer.bias += 3
        mixer.qkv.weight[:32] *= 5
        mixer.qkv.bias[:32] *= 5
        torch.testing.assert_close(mixer(x), wanted)


@pytest.mark.parametrize("options", [{}, dict(relative=False), dict(normalise=False), dict(scale=2.0)])
def test_weights_are_a_distribution(options):
    model, x = torch.nn.Sequential(made((5,), **options)), torch.randn(2, 5, 16, dtype=torch.float64)
    with record(model) as r:
        model(x)
    dense = r["0"].dense(batch=2)
    assert dense.min() > 0
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))


def test_causal_sees_nothing_ahead():
    mixer = made((8,), causal=True, method="fft")
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    moved = x.clone()
    moved[0, 5] += 1
    change = (mixer(moved) - mixer(x)).abs().amax(-1)[0]
    assert change[:5].max() < 1e-12 and change[5:].min() > 1e-6
