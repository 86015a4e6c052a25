"""Projection heads: the fixed one, the theory of the linear network, the losses beside their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError
from saccade.papers.projection_head import (
    ReweightingHead,
    SymmetricRelu,
    effective_rank,
    feature_weights,
    identity_head,
    mlp_head,
    spectral_contrastive,
)
from saccade.parts.losses import supervised_contrastive


def test_heads():
    x = torch.randn(4, 6)
    assert torch.equal(ReweightingHead(6, 1.0)(x), x)
    torch.testing.assert_close(ReweightingHead(6, 2.0)(x), x / 2.0 ** torch.arange(6))
    assert ReweightingHead(2048).weights.isfinite().all() and not list(ReweightingHead(4).parameters())
    assert torch.equal(identity_head(6)(x), x)
    found = SymmetricRelu(0.5)(torch.tensor([-2.0, -0.2, 0.3, 1.0]))
    torch.testing.assert_close(found, torch.tensor([-1.5, 0, 0, 0.5]))
    assert mlp_head(6, 3, hidden=5, layers=2)(x).shape == (4, 3)
    with pytest.raises(SaccadeError, match="kappa=0.5"):
        ReweightingHead(6, 0.5)


def test_supervised_contrastive_beside_loops():
    z, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2])
    unit = z / z.norm(dim=1, keepdim=True)
    total = []
    for i in range(4):  # the fifth has no partner
        others = torch.stack([unit[i] @ unit[j] / 0.7 for j in range(5) if j != i])
        partners = torch.stack([unit[i] @ unit[j] / 0.7 for j in range(5) if j != i and labels[j] == labels[i]])
        total.append(others.exp().sum().log() - partners.mean())
    torch.testing.assert_close(supervised_contrastive(z, labels, 0.7), torch.stack(total).mean())
    torch.testing.assert_close(supervised_contrastive(3 * z, labels, 0.7), torch.stack(total).mean())
    with pytest.raises(SaccadeError, match="two views"):
        supervised_contrastive(z, torch.arange(5))


def test_in_a_linear_network_the_head_squares_the_weights():
    """Section 4: from a small balanced start W1 W1' = W2' W2 stays, and singular values after the head are squares."""
    torch.manual_seed(0)
    scales = torch.tensor([2.0, 1.5, 1.0])
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        q, _ = torch.linalg.qr(torch.randn(3, 3))
        first.weight.copy_(0.05 * q)
        second.weight.copy_(0.05 * torch.eye(3))
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.01)
    for _ in range(600):
        content = torch.randn(256, 3) * scales
        a, b = (content + 0.3 * torch.randn(256, 3) for _ in range(2))
        loss = spectral_contrastive(second(first(a)), second(first(b)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(first.weight @ first.weight.T, second.weight.T @ second.weight, rtol=0, atol=0.02)
    before, after = torch.linalg.svdvals(first.weight), torch.linalg.svdvals(second.weight @ first.weight)
    torch.testing.assert_close(after, before**2, rtol=0.05, atol=0.02)
    inputs = torch.randn(2000, 3) * scales
    with torch.no_grad():
        assert effective_rank(first(inputs)) > effective_rank(second(first(inputs)))


def test_measures():
    torch.manual_seed(0)
    features = torch.randn(20000, 3) * torch.tensor([3.0, 2.0, 0.0])
    torch.testing.assert_close(feature_weights(features, 7 * torch.eye(3)), torch.tensor([9.0, 4.0, 0.0]), rtol=0.05,
                               atol=0.05)
    assert float(effective_rank(torch.randn(20000, 5))) == pytest.approx(5, rel=1e-2)
    assert float(effective_rank(torch.randn(50, 1) * torch.ones(5))) == pytest.approx(1, rel=1e-3)
