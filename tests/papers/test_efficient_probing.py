"""Probes: what a query pools, what learns, what a probe of each kind reads off frozen tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.papers.efficient_probing import POOLINGS, EfficientProbing, Probe, SimPool


def test_each_query_pools_its_slice():
    pool, tokens = EfficientProbing(8, queries=2, shrink=2).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    values = pool.v(tokens)[0]
    parts = []
    for number, query in enumerate(pool.queries):
        weights = (tokens[0] @ query / 8**0.5).softmax(0)
        parts.append((weights[:, None] * values[:, 2 * number:2 * number + 2]).sum(0))
    torch.testing.assert_close(pool(tokens)[0], torch.cat(parts))
    with pytest.raises(SaccadeError, match="3 queries"):
        EfficientProbing(8, queries=3)


def test_gamma_goes_from_the_mean_to_the_largest():
    tokens = torch.randn(1, 5, 8, dtype=torch.float64)
    plain, mean, high = (SimPool(8, gamma).double() for gamma in (None, 1.0, 300.0))
    mean.load_state_dict(plain.state_dict())
    high.load_state_dict(plain.state_dict())
    normed = plain.norm(tokens)
    torch.testing.assert_close(mean(tokens) + normed.amin() - 1e-6, plain(tokens))
    torch.testing.assert_close(high(tokens) + normed.amin(), normed.amax(1), rtol=0, atol=0.1)


class Marked(nn.Module):
    """Tokens of which one, at a random place, says the class: its mean over places hides it in noise."""

    def forward(self, image):
        return image


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_probe_learns_and_the_encoder_does_not(pooling):
    torch.manual_seed(0)
    options = {"efficient": dict(queries=4), "mean_query": dict(heads=4), "aim": dict(heads=4)}.get(pooling, {})
    encoder = nn.Sequential(Marked(), nn.Linear(16, 16), nn.BatchNorm1d(9))
    probe = Probe(encoder, 16, 3, pooling, prefix=1, **options)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    labels = torch.arange(60) % 3
    tokens = 0.3 * torch.randn(60, 9, 16)
    tokens[torch.arange(60), 1 + torch.randint(8, (60,)), labels] += 4
    optimizer = torch.optim.Adam([each for each in probe.parameters() if each.requires_grad], 1e-2)
    for _ in range(80):
        loss = nn.functional.cross_entropy(probe.train()(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((probe.eval()(tokens).argmax(1) == labels).float().mean()) > 0.9
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_on_a_plain_transformer():
    model = create_model("deit_nano", num_classes=0)
    model.forward = model.forward_features
    assert Probe(model, model.num_features, 7, queries=8).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(SaccadeError, match="choose from linear"):
        Probe(model, model.num_features, 7, "linar")
