"""What the goldens of legal retrieval do not show: sparsemax's properties, padding, Attentive CNN, BM25, the blend."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, record
from saccade.papers.legal_retrieval import (
    BM25,
    AttentiveCNN,
    Paraformer,
    blend,
    precision_recall_f2,
    sparsemax,
)
from tests.contracts.registered import randomised


def nearest(scores):
    """The projection on the simplex by bisection: sum of max(e - tau, 0) falls in tau."""
    low, high = float(scores.min()) - 1, float(scores.max())
    for _ in range(100):
        middle = (low + high) / 2
        if float((scores - middle).clamp(min=0).sum()) > 1:
            low = middle
        else:
            high = middle
    return (scores - low).clamp(min=0)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_sparsemax_is_the_nearest_point_of_the_simplex(spread):
    scores = spread * torch.randn(4, 9, dtype=torch.float64)
    weights = sparsemax(scores)
    torch.testing.assert_close(weights, torch.stack([*map(nearest, scores)]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(sparsemax(scores + 7), weights)
    torch.testing.assert_close(sparsemax(scores.T, 0), weights.T)


def test_what_sparsemax_does_to_little_and_to_gaps():
    assert sparsemax(torch.tensor([[3.0]])).tolist() == [[1.0]]
    assert sparsemax(torch.tensor([2.0, 1.0, -4.0])).tolist() == [1.0, 0.0, 0.0]  # a gap of 1 decides
    assert sparsemax(torch.tensor([0.5, 0.5, -torch.inf])).tolist() == [0.5, 0.5, 0.0]


def test_the_slope_of_sparsemax():
    """diag(s) - s s^T / |S|, s the indicator of the support S."""
    scores = torch.tensor([0.3, 0.5, -2.0, 0.4], dtype=torch.float64)
    support = (sparsemax(scores) > 0).double()
    slope = torch.autograd.functional.jacobian(sparsemax, scores)
    torch.testing.assert_close(slope, support.diag() - torch.outer(support, support) / support.sum())


def test_order_padding_and_idle_sentences_change_nothing():
    head = randomised(Paraformer(6)).double()
    question, sentences = torch.randn(2, 6).double(), torch.randn(2, 5, 6).double()
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with torch.no_grad():
        out = head(question, sentences, valid)
        torch.testing.assert_close(head(question, sentences.flip(1), valid.flip(1)), out)
        torch.testing.assert_close(head(question[1:], sentences[1:, :2]), out[1:])
        asked = head.attention.query(question)
        idle = torch.cat([sentences, -9 * asked[:, None]], 1)
        torch.testing.assert_close(head(question, idle), head(question, sentences))
        twice = torch.cat([sentences, sentences], 1)
        assert torch.allclose(head.attention(question, twice)[1][:, :5], head.attention(question, twice)[1][:, 5:])


def test_which_sentences_count_is_recorded():
    head = torch.nn.Sequential(randomised(Paraformer(6)))
    question, sentences = torch.randn(2, 6), torch.randn(2, 5, 6)
    with torch.no_grad(), record(head) as r:
        _, weights = head[0].attention(question, sentences)
        head[0](question, sentences)
    assert torch.equal(r["0.attention"].parts[-1].weights[:, 0, 0], weights)


def test_an_article_in_loops():
    """Sentence by sentence, without its padding: of words, and of empty sentences."""
    model = randomised(AttentiveCNN(30, dim=4, channels=6)).double()
    model.words.weight.data[0] = 0
    words = torch.tensor([[[3, 9, 4, 0, 0], [7, 2, 0, 0, 0], [0, 0, 0, 0, 0]]])
    with torch.no_grad():
        vectors = []
        for sentence in (words[0, 0, :3], words[0, 1, :2]):
            x = F.conv1d(F.pad(model.words(sentence).T, (1, 1)), model.convolution.weight, model.convolution.bias)
            x = x.relu().T
            vectors.append(nearest(model.pool_words.score(x)[:, 0]) @ x)
        vectors = torch.stack(vectors)
        wanted = nearest(model.pool_sentences.score(vectors)[:, 0]) @ vectors
        torch.testing.assert_close(model.article(words)[0], wanted)
        question = torch.tensor([[5, 3, 0]])
        torch.testing.assert_close(model(question, words), model.sentence(question) @ wanted)
        assert not model.article(torch.zeros(1, 2, 3, dtype=torch.long)).any()


def test_attentive_cnn_finds_the_sentence_that_matters():
    """Of articles of four sentences the one that has the question's words, wherever."""
    torch.manual_seed(0)
    model = AttentiveCNN(40, dim=16, channels=24)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def draw(count, others=4):
        articles = torch.randint(1, 40, (count, others, 4, 6))
        question = articles[:, 0, torch.randint(4, (1,)).item(), 1:5].clone()
        return question, articles

    for _ in range(300):
        question, articles = draw(32)
        vectors = model.article(articles.flatten(0, 1)).unflatten(0, (32, -1))
        loss = F.cross_entropy((vectors @ model.sentence(question)[..., None])[..., 0], torch.zeros(32).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    question, articles = draw(400)
    with torch.no_grad():
        vectors = model.article(articles.flatten(0, 1)).unflatten(0, (400, -1))
        found = (vectors @ model.sentence(question)[..., None])[..., 0].argmax(1)
        assert (found == 0).float().mean() > 0.6  # a quarter by luck
        assert all(value.grad.isfinite().all() for value in model.parameters())


DOCUMENTS = [text.split() for text in ("the contract of sale", "the minor and the contract", "the lease", "theft",
                                       "sale sale of goods")]


def test_bm25_in_loops():
    scores, mean = BM25(DOCUMENTS)(["sale", "the", "unheard", "sale"]), sum(map(len, DOCUMENTS)) / 5
    known = {token: sum(token in document for document in DOCUMENTS) for document in DOCUMENTS for token in document}
    idf = {token: log((5 - n + 0.5) / (n + 0.5)) for token, n in known.items()}
    lowest = 0.25 * sum(idf.values()) / len(idf)
    assert idf["the"] < 0 < lowest
    for document, found in zip(DOCUMENTS, scores.tolist()):
        wanted = 0.0
        for token, times, weight in (("sale", 2, idf["sale"]), ("the", 1, lowest)):
            f = document.count(token)
            wanted += times * weight * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(document) / mean))
        assert found == pytest.approx(wanted)
    with pytest.raises(SaccadeError, match="no tokens"):
        BM25([[], []])


def test_the_blend_is_between_both_orders():
    lexical, deep = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.tensor([0.0, 9.0, 1.0, 99.0, 5.0])
    assert blend(deep, lexical, 0.0, 4).tolist() == [0, 1, 2, 3]
    assert blend(deep, lexical, 1.0, 4).tolist() == [3, 1, 2, 0]  # the fifth was no candidate
    assert blend(deep, lexical, 0.2, 3).tolist() == [1, 0, 2]  # 5.0, 4.0, 2.6 for 1, 0, 2
    assert blend(deep, lexical, candidates=99).tolist() == [3, 0, 1, 2, 4]


def test_f2_is_the_mean_over_questions():
    found, relevant = [[1], [2, 3], [4], []], [[1], [3], [5, 6], [7]]
    p, r, f2 = precision_recall_f2(found, relevant)
    assert (p, r) == (pytest.approx(1.5 / 4), pytest.approx(2 / 4))
    assert f2 == pytest.approx((1 + 5 * 0.5 / (2 + 1)) / 4)
    assert precision_recall_f2([[1, 2]], [[1, 3]]) == (0.5, 0.5, 0.5)
