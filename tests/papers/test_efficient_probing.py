"""Probes: what a query pools, what learns, what a probe of each kind reads off frozen tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.papers.efficient_probing import POOLINGS, CrossAttentionPooling, EfficientProbing, Probe, SimPool


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


def test_a_normalised_query_looks_with_all_projections():
    """The same numbers as torch's own attention, fed with what CAE's norms give."""
    pool, tokens = CrossAttentionPooling(8, heads=2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    parts = (pool.q, pool.k, pool.v)
    theirs.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    theirs.out_proj.load_state_dict(pool.proj.state_dict())
    for norm in (pool.norm_q, pool.norm_k, pool.norm_v):
        nn.init.normal_(norm.weight)
    query = pool.norm_q(pool.query).expand(3, 1, -1)
    torch.testing.assert_close(pool(tokens), theirs(query, pool.norm_k(tokens), pool.norm_v(tokens))[0][:, 0])


class Marked(nn.Module):
    """Tokens of which one, at a random place, says the class: its mean over places hides it in noise."""

    def forward(self, image):
        return image


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_probe_learns_and_the_encoder_does_not(pooling):
    torch.manual_seed(0)
    options = {"efficient": dict(queries=4), "mean_query": dict(heads=4), "aim": dict(heads=4),
               "multi_head": dict(heads=4), "cae": dict(heads=4)}.get(pooling, {})
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
