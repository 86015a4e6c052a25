"""The autoencoder is tied to its bias; a circuit that was planted is found, with precision and recall."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from saccade import SaccadeError
from saccade.papers.sae_circuits import SparseAutoencoder, circuit, edge_scores, head_scores, train_autoencoder, votes

POSITIVE = torch.arange(80) < 40
CIRCUIT = (1, 4, 6)


def planted(seed=0):
    """Head outputs (80, 8, 16): every head says one of three words; those of the circuit say others for positives."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    spoken = torch.randint(3, (80, 8), generator=generator)
    for head in CIRCUIT:
        spoken[POSITIVE, head] += 3
    return 3 * words[spoken] + 0.05 * torch.randn(80, 8, 16, generator=generator)


def test_the_planted_circuit_is_found():
    nodes, edges = circuit(planted(), POSITIVE, features=32, sparsity=0.02, steps=200)
    for scores in (nodes, votes(edges)):
        found = set(scores.topk(len(CIRCUIT)).indices.tolist())
        precision = recall = len(found & set(CIRCUIT)) / len(CIRCUIT)
        assert precision == recall == 1


def test_the_bias_moves_with_the_input():
    model, x = SparseAutoencoder(16, 32), planted()
    features, rebuilt = model(x)
    with torch.no_grad():
        model.bias += 2
    moved, shifted = model(x + 2)
    assert_close(moved, features, rtol=1e-4, atol=1e-4)
    assert_close(shifted, rebuilt + 2, rtol=1e-4, atol=1e-4)


def test_scale_of_the_weights_changes_nothing_and_training_lowers_the_error():
    x = planted()
    model = train_autoencoder(x, 32, steps=100)
    before = model(x)
    with torch.no_grad():
        model.encoder.weight *= 3
        model.decoder.weight *= 0.2
    assert_close(model(x)[1], before[1], rtol=1e-4, atol=1e-4)
    untrained = train_autoencoder(x, 32, steps=0)
    assert (before[1] - x).square().mean() < 0.5 * (untrained(x)[1] - x).square().mean()


def test_scores_depend_on_sets_alone():
    codes = torch.randint(6, (80, 5), generator=torch.Generator().manual_seed(1)) % torch.tensor([6, 5, 4, 3, 6])
    codes[POSITIVE, 0] += 6
    renamed = torch.randperm(12, generator=torch.Generator().manual_seed(2))[codes]
    for score in (head_scores, edge_scores):
        assert_close(score(renamed, POSITIVE), score(codes, POSITIVE))
        twice = score(torch.cat([codes, codes]), torch.cat([POSITIVE, POSITIVE]))
        assert_close(twice, score(codes, POSITIVE))
    assert head_scores(codes, POSITIVE).tolist()[0] == 6 and head_scores(codes, POSITIVE, normalise=True)[0] == 0.5
    edges = edge_scores(codes, POSITIVE)
    assert torch.equal(edges, edges.T) and edges.diagonal().sum() == 0
    same = torch.cat([codes[:40], codes[:40]])
    assert head_scores(same, POSITIVE).sum() == 0 and edge_scores(same, POSITIVE).sum() == 0


def test_errors_say_what_to_do():
    with pytest.raises(SaccadeError, match=r"\(4,\).*bool an example"):
        head_scores(torch.zeros(5, 3).long(), torch.ones(4).bool())
