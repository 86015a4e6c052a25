"""What the goldens of adversarial attention do not show: its forms in loops, slopes, other networks, the reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade import SaccadeError, create_model
from saccade.papers.attention_iat import (
    FORMS,
    AttentiveReader,
    WordAttention,
    adversarial_loss,
    agreement,
    moved,
)
from tests.contracts.registered import randomised


def test_moved_weights_are_those_of_moved_scores():
    scores, by = 3 * torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    scores[1, 3:] = -torch.inf
    torch.testing.assert_close(moved(scores.softmax(-1), by), (scores + by).softmax(-1))
    torch.testing.assert_close(moved(scores.softmax(-1), 300 * by), (scores + 300 * by).softmax(-1))


def test_the_paper_s_interpretable_step_in_loops():
    """r_t = sum_k w_tk d_tk with w at the slope of the loss at w = 0, all pairs written out."""
    scores, v = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    scores[2] = 0.3  # all equal: nothing can move
    wanted = []
    for row, value in zip(scores, v):
        differences = torch.stack([F.normalize(torch.stack([a - b for b in row]), dim=0) for a in row])
        w = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
        loss = ((row + (w * differences).sum(1)).softmax(0) * value).sum().square()
        slope = torch.autograd.grad(loss, w)[0]
        w = slope / slope.norm().clamp(min=1e-300)
        wanted.append((w * differences).sum(1))
    scores.requires_grad_()
    weights = scores.softmax(-1)
    slopes = torch.autograd.grad((weights * v).sum(1).square().sum(), scores)[0]
    torch.testing.assert_close(FORMS["iat"](weights.detach(), slopes), torch.stack(wanted))
    torch.testing.assert_close(FORMS["at"](weights, slopes)[:2], torch.stack(wanted)[:2])
    torch.testing.assert_close(FORMS["released_iat"](weights, slopes), -FORMS["at"](weights, slopes))


def reader(**options):
    torch.manual_seed(0)
    model = randomised(AttentiveReader(30, dim=6, hidden=4, **options)).double().eval()
    with torch.no_grad():
        model.words.weight[0] = 0
    return model


SENTENCES = torch.tensor([[3, 9, 4, 7, 2], [5, 6, 0, 0, 0], [8, 8, 1, 2, 0]])
LABELS = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def loss_of(model):
    return F.binary_cross_entropy_with_logits(model(SENTENCES)[:, 0], LABELS, reduction="sum")


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_moves_as_its_slopes_say(form):
    """L(a + r) - L(a) = eps |g| summed over sentences, to first order; of the released form with a minus."""
    model = reader()
    found = adversarial_loss(model, lambda: loss_of(model), size=1e-5, form=form)
    (slopes,) = found.slopes["attention"]
    assert not slopes[1, 0, 0, 2:].any()  # padding
    torch.testing.assert_close(slopes.sum(-1), torch.zeros(3, 1, 1, dtype=torch.float64))  # a constant moves nothing
    wanted = slopes.norm(dim=-1).sum() * 1e-5 * (-1 if form == "released_iat" else 1)
    torch.testing.assert_close(found.adversarial - found.clean, wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.clean, loss_of(model))


def test_its_gradient_is_that_of_two_losses_with_the_step_held():
    model = reader()
    found = adversarial_loss(model, lambda: loss_of(model), size=0.7, weight=0.5)
    gradients = torch.autograd.grad(found.total, list(model.parameters()))
    by = 0.7 * F.normalize(found.slopes["attention"][0][:, 0, 0], dim=-1)
    states, _ = torch.nn.utils.rnn.pad_packed_sequence(model.reader(torch.nn.utils.rnn.pack_padded_sequence(
        model.words(SENTENCES), torch.tensor([5, 2, 4]), batch_first=True, enforce_sorted=False))[0], batch_first=True)
    scores = model.attention.score(model.attention.word(states).tanh())[..., 0]
    total = 0
    for scale, step in ((1.0, 0), (0.5, by)):
        weights = (scores + step).masked_fill(SENTENCES == 0, -torch.inf).softmax(-1)
        logits = model.out((weights[:, None] @ states)[:, 0])[:, 0]
        total = total + scale * F.binary_cross_entropy_with_logits(logits, LABELS, reduction="sum")
    for found_one, wanted in zip(gradients, torch.autograd.grad(total, list(model.parameters()))):
        torch.testing.assert_close(found_one, wanted)


def test_a_step_of_no_length_changes_nothing_not_even_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)).train()
    x = torch.randn(3, 5, 8)
    found = adversarial_loss(model, lambda: model(x).square().mean(), size=0.0, weight=2.0)
    torch.testing.assert_close(found.adversarial, found.clean)
    torch.testing.assert_close(found.total, 3 * found.clean)


@pytest.mark.parametrize("name", ["deit_nano", "swin_nano", "biformer_nano"])
def test_any_network_whose_attention_is_recorded(name):
    torch.manual_seed(0)
    model = randomised(create_model(name, num_classes=4)).double().train()
    image, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 3])
    found = adversarial_loss(model, lambda: F.cross_entropy(model(image), labels), size=1e-6)
    rise = sum(slope.norm(dim=-1).sum() for slopes in found.slopes.values() for slope in slopes) * 1e-6
    torch.testing.assert_close(found.adversarial - found.clean, rise, rtol=0.02, atol=0)
    found.total.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    one = next(key for key in found.slopes)
    alone = adversarial_loss(model, lambda: F.cross_entropy(model(image), labels), layers=one)
    assert [*alone.slopes] == [one]


def test_a_sentence_is_read_as_if_alone():
    model, question = reader(asked=True, classes=3), torch.tensor([[4, 2, 0], [7, 1, 9], [3, 0, 0]])
    with torch.no_grad():
        out = model(SENTENCES, question)
        for row, (long, asked) in enumerate([(5, 2), (2, 3), (4, 1)]):
            torch.testing.assert_close(out[row:row + 1],
                                       model(SENTENCES[row:row + 1, :long], question[row:row + 1, :asked]))
        other = model(SENTENCES, question.flip(0))
        assert (other - out).abs().amax(1)[[0, 2]].min() > 1e-6
    with pytest.raises(SaccadeError, match="question"):
        model(SENTENCES)
    with pytest.raises(SaccadeError, match="sentence 1 begins with 0"):
        model(torch.tensor([[3, 4], [0, 4]]), question[:2])


def test_padding_has_no_attention():
    attention, valid = randomised(WordAttention(6)), torch.tensor([[True, True, False], [True, True, True]])
    weights = attention(torch.randn(2, 3, 6), valid)
    assert weights[0, 2] == 0
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


def test_agreement_is_pearson_s_correlation():
    a, b = torch.rand(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    found = agreement(a, b, valid)
    for row, long in enumerate((6, 4, 2)):
        assert float(found[row]) == pytest.approx(np.corrcoef(a[row, :long], b[row, :long])[0, 1])
    assert agreement(torch.full((1, 4), 0.25), torch.rand(1, 4)).item() == 0


def test_what_makes_no_sense_is_one_line():
    model = reader()
    with pytest.raises(SaccadeError, match="released_iat"):
        adversarial_loss(model, lambda: loss_of(model), form="iat_released")
    with pytest.raises(SaccadeError, match="nothing to move"):
        adversarial_loss(nn.Sequential(nn.Linear(2, 2)), lambda: torch.zeros(()))
    calls = iter([SENTENCES, SENTENCES[:2]])
    with pytest.raises(SaccadeError, match="on the same batch"):
        adversarial_loss(model, lambda: model(next(calls)).sum())
