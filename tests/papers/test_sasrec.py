"""What SASRec's golden does not show: causality, padding, long histories, the loss, what is drawn, learning."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from saccade import record
from saccade.papers.sasrec import SASRec, untaken
from tests.contracts.registered import randomised


def network(**options):
    model = SASRec(20, **{"length": 8, "dim": 6} | options)
    with torch.no_grad():
        for parameter in randomised(model).parameters():
            parameter.mul_(3)
        model.items.weight[0] = model.positions.weight[0] = 0
    return model.double().eval()


@pytest.mark.parametrize("norm_first", [False, True])
def test_no_place_knows_what_comes_after_it(norm_first):
    model, history = network(norm_first=norm_first, heads=2), torch.randint(1, 21, (3, 8))
    moved = history.clone()
    moved[:, 5] = moved[:, 5] % 20 + 1
    with torch.no_grad():
        change = (model.features(moved) - model.features(history)).abs().amax((0, 2))
    assert change[:5].max() == 0 and change[5:].min() > 1e-9


def test_all_items_are_scored_as_each_alone():
    model, history = network(), torch.randint(0, 21, (3, 8))
    candidates = torch.arange(21).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(history), model(history, candidates))
        assert not model(history)[:, 0].any()  # padding


def test_of_a_long_history_the_last_items_count():
    model, history = network(), torch.randint(1, 21, (2, 13))
    with torch.no_grad():
        assert torch.equal(model(history), model(history[:, -8:]))


def test_the_loss_in_loops():
    model = network()
    history, following = torch.tensor([[0, 3, 7], [2, 5, 2]]), torch.tensor([[0, 7, 1], [5, 2, 9]])
    others = torch.tensor([[4, 4, 6], [8, 1, 1]])
    with torch.no_grad():
        known, table, total = model.features(history), model.items.weight, [0.0, 0.0]
        for row in range(2):
            for place in range(3):
                if following[row, place]:
                    right, wrong = (float(known[row, place] @ table[one[row, place]]) for one in (following, others))
                    total[0] -= log(1 / (1 + exp(-right)))
                    total[1] -= log(1 - 1 / (1 + exp(-wrong)))
        assert float(model.loss(history, following, others)) == pytest.approx(sum(total) / 5)


def test_the_loss_of_a_long_history_is_of_its_last_places():
    model, history = network(), torch.randint(1, 21, (2, 12))
    following, others = torch.randint(1, 21, (2, 12)), torch.randint(1, 21, (2, 12))
    torch.testing.assert_close(model.loss(history, following, others),
                               model.loss(history[:, -8:], following[:, -8:], others[:, -8:]))


def test_what_is_drawn_was_never_taken_and_is_uniform():
    taken = torch.tensor([[0, 0, 1, 3], [2, 4, 2, 2]]).repeat(1, 2000)
    drawn = untaken(taken, 5, torch.Generator().manual_seed(0))
    assert drawn.shape == taken.shape
    for row, free in ((0, [2, 4, 5]), (1, [1, 3, 5])):
        counts = torch.bincount(drawn[row], minlength=6) / drawn.shape[1]
        wanted = torch.zeros(6).index_fill(0, torch.tensor(free), 1 / 3)
        torch.testing.assert_close(counts, wanted, rtol=0, atol=0.03)


def test_padding_learns_nothing_and_all_else_does():
    model = SASRec(20, length=6, dim=8)
    history = torch.tensor([[0, 0, 3, 5, 1, 9]])
    model.loss(history, torch.tensor([[0, 0, 5, 1, 9, 2]]), torch.tensor([[7, 7, 7, 8, 8, 8]])).backward()
    assert not model.items.weight.grad[0].any() and not model.positions.weight.grad[0].any()
    assert all(value.grad.isfinite().all() and value.grad.abs().max() > 0 for value in model.parameters())


def test_what_it_looks_at_is_recorded():
    model, history = network(heads=2), torch.randint(1, 21, (3, 8))
    with torch.no_grad(), record(model) as r:
        watched = model.features(history)
    torch.testing.assert_close(watched, model.features(history).detach())
    weights = r["layers.0.mixer"].dense(batch=3)
    assert weights.shape == (3, 2, 8, 8) and not weights.triu(1).any()


def test_it_learns_a_cycle_with_gaps():
    """Of two interleaved cycles the next item is that after the last but one: a Markov chain of one step is lost."""
    torch.manual_seed(0)
    model = SASRec(12, length=10, dim=16, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def draw(count):
        start = torch.randint(0, 6, (count, 2))
        steps = torch.arange(11)
        return torch.where(steps % 2 == 0, (start[:, :1] + steps // 2) % 6, 6 + (start[:, 1:] + steps // 2) % 6) + 1

    for _ in range(400):
        items = draw(64)
        loss = model.loss(items[:, :-1], items[:, 1:], torch.randint(1, 13, (64, 10)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    items = draw(500)
    with torch.no_grad():
        found = model.eval()(items[:, :-1])[:, 1:].argmax(1) + 1
    assert (found == items[:, -1]).float().mean() > 0.9
