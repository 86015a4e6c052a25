"""Sparse autoencoders name what attention heads do, and heads that say something new are the circuit.

One small autoencoder is trained on the outputs of all heads for a few examples x (examples, heads, d):
    f = relu(W_e (x - b) + b_e),   x' = W_d f + b,   loss = mean (x' - x)^2 + sparsity mean over heads of |f|_1.
A head's code is the argmax of f. With examples where the behaviour shows (positive) and where it does not, the score of
a head is the number of codes that it uses for positives alone; that of an edge counts such pairs of codes.

O'Neill, Bui, "Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models", 2024.

Quirks kept: both weights get rows of length 1 before each use (for W_d these run over the features, not over d), and
an f of zeros has the code 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap

CARD = Card(
    "Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models",
    authors="O'Neill, Bui",
    year=2024,
    systems=("sae_circuits",),
    arxiv="2405.12522",
    code="charlieoneill11/sae-circuits@10fd2e7",
    read="paper",
    keywords="sparse autoencoder, discrete codes, attention heads, circuit identification, edges",
    kinds=("explain",),
    goldens=("sae_circuits_d64_f48", "op_sae_circuit_scores"),
    tests=("tests/papers/test_sae_circuits.py",),
)


class SparseAutoencoder(nn.Module):
    """x (..., d) -> features f (..., F) and x' (..., d); one bias before the encoder and after the decoder."""

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(dim, features)
        self.decoder = nn.Linear(features, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.linear(x - self.bias, F.normalize(self.encoder.weight, dim=1), self.encoder.bias).relu()
        return features, F.linear(features, F.normalize(self.decoder.weight, dim=1)) + self.bias


def train_autoencoder(
    x: Tensor, features: int = 200, sparsity: float = 0.02, steps: int = 500, rate: float = 1e-3, seed: int = 0
) -> SparseAutoencoder:
    """An autoencoder for head outputs x (examples, heads, d): full-batch Adam; global random state as it was.

    Weights are divided by their rows' lengths in the forward, so that their gradients have no part along the rows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SparseAutoencoder(x.shape[-1], features).to(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        found, rebuilt = model(x)
        loss = (rebuilt - x).square().mean() + sparsity * found.abs().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def head_scores(codes: Tensor, positive: Tensor, normalise: bool = False) -> Tensor:
    """How many codes (examples, heads) each head uses for `positive` (examples,) alone, (heads,).

    `normalise` divides by the number of codes that the head uses at all. Raises SaccadeError for other shapes.
    """
    _check(codes, positive)
    scores = []
    for head in codes.T.tolist():
        chosen = {code for code, flag in zip(head, positive.tolist(), strict=True) if flag}
        other = {code for code, flag in zip(head, positive.tolist(), strict=True) if not flag}
        scores.append(len(chosen - other) / (len(chosen | other) if normalise else 1))
    return torch.tensor(scores)


def edge_scores(codes: Tensor, positive: Tensor, normalise: bool = False) -> Tensor:
    """How many pairs of codes two heads use together for `positive` alone, (heads, heads), the diagonal 0.

    `normalise` divides by the numbers of pairs for positives and for negatives, added.
    """
    _check(codes, positive)
    heads = codes.shape[1]
    size = int(codes.max()) + 1
    scores = torch.zeros(heads, heads)
    for first in range(heads):
        for second in range(first + 1, heads):
            pairs = codes[:, first] * size + codes[:, second]
            chosen, other = set(pairs[positive].tolist()), set(pairs[~positive].tolist())
            score = len(chosen - other) / (max(len(chosen) + len(other), 1) if normalise else 1)
            scores[first, second] = scores[second, first] = score
    return scores


def votes(edges: Tensor) -> Tensor:
    """Edges (heads, heads) as scores of heads: ordered pairs, best first, vote for both heads, heads^2 / 2 votes."""
    heads = len(edges)
    order = edges.flatten().argsort(descending=True, stable=True)
    named = torch.stack([order // heads, order % heads], 1).flatten()[: heads * heads // 2]
    return torch.bincount(named, minlength=heads).float().softmax(0)


def circuit(
    x: Tensor, positive: Tensor, features: int = 200, sparsity: float = 0.02, steps: int = 500, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Scores of the heads (heads,) and of the edges (heads, heads) from head outputs x (examples, heads, d)."""
    _check(x[..., 0], positive)
    model = train_autoencoder(x, features, sparsity, steps, seed=seed)
    with torch.no_grad():
        codes = model(x)[0].argmax(-1)
    return head_scores(codes, positive).softmax(0), edge_scores(codes, positive)


def _check(codes: Tensor, positive: Tensor) -> None:
    if codes.ndim != 2 or positive.shape != codes.shape[:1] or positive.dtype != torch.bool:
        raise SaccadeError(f"codes {tuple(codes.shape)} and positive {tuple(positive.shape)}, {positive.dtype}: "
                           "give (examples, heads) and a bool an example")


AUTHORS: KeyMap = (
    Dropped(r"(.*\.)?_bias_reference", "the tied bias under another name"),
    (r"tied_bias", "bias"),
    (r"encoder\.1\.(.*)", r"encoder.\1"),
    (r"decoder\.0\.(.*)", r"decoder.\1"),
)
