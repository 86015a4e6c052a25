"""Attentive retrieval of statutes: of a long article only the few sentences that bear on the question count.

Articles are sentences, sentences are vectors s_j. A question q gathers them by weights of which most are exactly zero,
    q' = W q,   m = sum_j w_j s_j,   w = sparsemax(q' . s_j),   logits = V tanh(U [m, q']),
where sparsemax(e) is the point of the simplex that is nearest to e, max(e - tau, 0). That is Paraformer's head, on the
vectors of a pretrained sentence encoder; Attentive CNN makes its own by convolution, and pools words to sentences and
sentences to an article by the same sparse weights. Their score is blended with BM25's, which knows rare words.

Nguyen, Phi, Ngo, Tran, Nguyen, Tu, "Attentive Deep Neural Networks for Legal Document Retrieval", 2022; sparsemax is
Martins, Astudillo, "From Softmax to Sparsemax", 2016.

Any number of sentences and words: `valid`, or word 0, says which are padding.
Quirks kept: scores are not divided by sqrt(d); what is concatenated is the projected question, after the mixture; BM25
lifts negative weights of words to a quarter of the mean. Attentive CNN has no published code: its layers are inferred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import log

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import note_rows

CARD = Card(
    "Attentive Deep Neural Networks for Legal Document Retrieval",
    authors="Nguyen, Phi, Ngo, Tran, Nguyen, Tu",
    year=2022,
    systems=("legal_retrieval",),
    arxiv="2212.13899",
    code="nguyenthanhasia/paraformer@0222c25",
    licence="unknown",
    read="abstract, fact sheet",
    keywords="Paraformer, Attentive CNN, sparsemax, hierarchical attention, statute law retrieval, BM25, COLIEE",
    kinds=("sequence",),
    goldens=("op_paraformer_head", "op_sparsemax"),
    tests=("tests/papers/test_legal_retrieval.py",),
)


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """max(e - tau, 0) along an axis, tau such that it sums to 1: the nearest point of the simplex to e.

    With e_(1) >= e_(2) >= ... the k largest remain, k the last with 1 + k e_(k) > c_k = e_(1) + ... + e_(k), and
    tau = (c_k - 1) / k. Entries of -inf get 0. (Martins, Astudillo, 2016, algorithm 1.)
    """
    ordered = scores.sort(dim, descending=True).values.movedim(dim, -1)
    rank = torch.arange(1, ordered.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    total = ordered.cumsum(-1) - 1
    count = (rank * ordered > total).sum(-1, keepdim=True)
    threshold = (total.gather(-1, count - 1) / count).movedim(-1, dim)
    return (scores - threshold).clamp(min=0)


def sparse_weights(scores: Tensor, valid: Tensor | None) -> Tensor:
    """sparsemax over the last axis of (..., N) where `valid` says so; all zero where nothing is."""
    if valid is not None:
        empty = ~valid.any(-1, keepdim=True)
        scores = scores.masked_fill(~(valid | empty), -torch.inf)
        return note_rows(sparsemax(scores) * ~empty)
    return note_rows(sparsemax(scores))


class SparseAttention(nn.Module):
    """tanh(U [sum_j w_j s_j, q']), q' = W q, w = sparsemax(q' . s_j): (B, C), (B, N, C) -> (B, C) and w (B, N)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, question: Tensor, sentences: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        asked = self.query(question)
        weights = sparse_weights((sentences @ asked[..., None])[..., 0], valid)
        mixture = (weights[:, None] @ sentences)[:, 0]
        return self.out(torch.cat([mixture, asked], -1)).tanh(), weights


class Paraformer(nn.Module):
    """Whether an article answers a question: vectors (B, C) and (B, N, C), `valid` (B, N) bool -> logits (B, 2).

    Vectors are those of a sentence encoder (paraphrase-mpnet-base-v2 in the paper, C = 768); class 1 is yes. The loss
    is cross-entropy against pairs of the best articles by BM25.
    """

    def __init__(self, dim: int = 768) -> None:
        super().__init__()
        self.attention = SparseAttention(dim)
        self.classifier = nn.Linear(dim, 2)

    def forward(self, question: Tensor, sentences: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.classifier(self.attention(question, sentences, valid)[0])


class AttentivePooling(nn.Module):
    """sum_j w_j x_j, w = sparsemax(v . tanh(W x_j)): (..., N, C), `valid` (..., N) -> (..., C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return (sparse_weights(self.score(x)[..., 0], valid)[..., None, :] @ x)[..., 0, :]


class AttentiveCNN(nn.Module):
    """Score of articles for questions: words (B, W) and (B, S, W'), 0 where there is none -> (B,).

    The product of two vectors, of which an article's can be kept: `sentence(words)`, `article(words)`, (B, C) each. The
    loss is cross-entropy over an article that answers and several that do not.
    """

    def __init__(self, vocabulary: int, dim: int = 300, channels: int = 512, kernel: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.convolution = nn.Conv1d(dim, channels, kernel, padding="same")
        self.pool_words, self.pool_sentences = AttentivePooling(channels), AttentivePooling(channels)

    def forward(self, question: Tensor, article: Tensor) -> Tensor:
        return (self.sentence(question) * self.article(article)).sum(-1)

    def sentence(self, words: Tensor) -> Tensor:
        """(..., W) -> (..., C); a sentence without words is zero."""
        x = self.words(words).flatten(0, -3)
        x = self.convolution(x.mT).mT.relu().unflatten(0, words.shape[:-1])
        return self.pool_words(x, words != 0)

    def article(self, words: Tensor) -> Tensor:
        """(B, S, W) -> (B, C)."""
        return self.pool_sentences(self.sentence(words), (words != 0).any(-1))


class BM25:
    """Okapi's BM25 of tokenised documents (Robertson, Walker, 1994): `BM25(documents)(query)` -> (documents,).

    sum over the query's tokens of idf f (k + 1) / (f + k (1 - b + b length / mean length)), f how often a document has
    the token, idf = log((N - n + 0.5) / (n + 0.5)) of N documents, n of which have it; where that is negative, `floor`
    times the mean idf stands for it.
    """

    def __init__(
        self, documents: Iterable[Sequence[str]], k: float = 1.5, b: float = 0.75, floor: float = 0.25
    ) -> None:
        self.counts = [Counter(document) for document in documents]
        if not any(self.counts):
            raise SaccadeError("BM25 of no tokens: give a list of documents, each a list of tokens")
        lengths = torch.tensor([float(sum(count.values())) for count in self.counts])
        self.k, self.spread = k, k * (1 - b + b * lengths / lengths.mean())
        having = Counter(token for count in self.counts for token in count)
        idf = {token: log((len(lengths) - n + 0.5) / (n + 0.5)) for token, n in having.items()}
        lowest = floor * sum(idf.values()) / len(idf)
        self.idf = {token: value if value >= 0 else lowest for token, value in idf.items()}

    def __call__(self, query: Iterable[str]) -> Tensor:
        score = torch.zeros(len(self.counts))
        for token in query:
            if token in self.idf:
                often = torch.tensor([float(count[token]) for count in self.counts])
                score += self.idf[token] * often * (self.k + 1) / (often + self.spread)
        return score


def blend(deep: Tensor, lexical: Tensor, alpha: float = 0.1, candidates: int = 10) -> Tensor:
    """Numbers of the best `candidates` by BM25 (N,), in the order of alpha deep + (1 - alpha) lexical, best first.

    `deep` (N,) is the logit of class 1, or any score; it is asked of the candidates alone.
    """
    best = lexical.topk(min(candidates, len(lexical))).indices
    mixed = alpha * deep[best] + (1 - alpha) * lexical[best]
    return best[mixed.argsort(descending=True, stable=True)]


def precision_recall_f2(
    found: Sequence[Iterable[int]], relevant: Sequence[Iterable[int]]
) -> tuple[float, float, float]:
    """Precision, recall and F2 = 5 P R / (4 P + R), each the mean over the questions (0 where nothing is right)."""
    rows = []
    for given, wanted in zip(map(set, found), map(set, relevant), strict=True):
        right = len(given & wanted)
        p, r = (right / len(among) if among else 0.0 for among in (given, wanted))
        rows.append((p, r, 5 * p * r / (4 * p + r) if right else 0.0))
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return means[0], means[1], means[2]


AUTHORS: KeyMap = (
    (r"general_attn\.linear_in\.(.*)", r"attention.query.\1"),
    (r"general_attn\.linear_out\.(.*)", r"attention.out.\1"),
)
