"""Statistics of filters have known values for random, rank-1 and two-pattern layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.papers.filter_db import filter_quality, filter_shift, model_quality, variance_entropy


def weight(out=64, channels=32, seed=0):
    return torch.randn(out, channels, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_random_filters_have_the_entropy_of_nine_equal_axes():
    found = filter_quality(weight())
    assert found.entropy == pytest.approx(math.log10(9), abs=2e-3) and found.normalised_entropy > 1
    assert found.sparsity == 0 and found.filters == 64 * 32


def test_few_patterns_have_low_entropy():
    patterns = torch.eye(9, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert variance_entropy(sign[:, None] * patterns[0]) == pytest.approx(0, abs=1e-12)
    both = torch.cat([sign[:, None] * patterns[0], sign[:, None] * patterns[4]])
    assert variance_entropy(both) == pytest.approx(math.log10(2))
    assert filter_quality(torch.ones(4, 2, 3, 3)).entropy == pytest.approx(0, abs=1e-9)


def test_scale_order_and_mirrors_change_nothing():
    one, other = filter_quality(weight()), filter_quality(3 * weight()[torch.randperm(64)].flip(3))
    for name in ("sparsity", "entropy", "live_entropy", "orthogonality", "standardised_l2"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6)
    assert other.l2 == pytest.approx(3 * one.l2)


def test_sparsity_counts_dead_filters():
    half = torch.cat([torch.ones(4, 2, 3, 3), torch.zeros(4, 2, 3, 3)])
    assert filter_quality(half).sparsity == 0.5 and filter_quality(torch.zeros(2, 2, 3, 3)).sparsity == 1


def test_shift_is_a_divergence_that_grows():
    near, far = weight(seed=1), weight(seed=2)
    far = far * torch.linspace(0.1, 2, 3)
    assert filter_shift(near, near) == pytest.approx(0, abs=1e-12)
    assert filter_shift(near, far) == pytest.approx(filter_shift(far, near), rel=1e-6)
    mixed = [torch.cat([near[:64 - part], far[:part]]) for part in (16, 32, 64)]
    shifts = [filter_shift(near, one) for one in mixed]
    assert 0 < shifts[0] < shifts[1] < shifts[2]


def test_a_model_is_read_and_errors_are_clear():
    assert len(model_quality(create_model("resnet18"))) == 16
    with pytest.raises(SaccadeError, match="no 3x3 convolution"):
        model_quality(nn.Linear(2, 2))
    with pytest.raises(SaccadeError, match=r"\(1, 1, 5, 5\)"):
        filter_quality(torch.ones(1, 1, 5, 5))
