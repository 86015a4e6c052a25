"""What DIN's goldens do not show: Dice in training, histories of any length, the decay of a batch, learning."""

from __future__ import annotations

from math import exp

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade import record
from saccade.papers.deep_interest_network import DeepInterest, Dice, InterestPooling, mini_batch_aware_decay
from tests.contracts.registered import randomised


def test_dice_in_loops():
    """In training by the mean and variance of the batch."""
    dice = randomised(Dice(3)).double().train()
    x = 2 + 3 * torch.randn(7, 3, dtype=torch.float64)
    out = dice(x)
    for channel in range(3):
        column = x[:, channel].tolist()
        mean = sum(column) / 7
        spread = (sum((s - mean) ** 2 for s in column) / 7) ** 0.5
        scale, shift, alpha = (value[channel].item() for value in (dice.norm.weight, dice.norm.bias, dice.alpha))
        for s, found in zip(column, out[:, channel].tolist()):
            p = 1 / (1 + exp(-(scale * (s - mean) / spread + shift)))
            assert found == pytest.approx(p * s + (1 - p) * alpha * s, rel=1e-6)


def test_dice_of_no_spread_is_prelu():
    dice, x = Dice(4).double().eval(), torch.randn(50, 4, dtype=torch.float64)
    with torch.no_grad():
        dice.norm.running_var.zero_()  # |s| / sqrt(1e-8): a step at 0
        dice.alpha.copy_(torch.tensor([0.0, 0.25, 0.5, 1.0]))
        wanted = torch.where(x > 0, x, dice.alpha * x)
        torch.testing.assert_close(dice(x), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("softmax", [False, True])
def test_padding_is_no_behaviour(softmax):
    pool = randomised(InterestPooling(4, (8,), softmax=softmax)).double().eval()
    candidate, behaviours = torch.randn(2, 4).double(), torch.randn(2, 5, 4).double()
    valid = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    with torch.no_grad():
        out = pool(candidate, behaviours, valid)
        torch.testing.assert_close(out[:1], pool(candidate[:1], behaviours[:1, :3]))
        assert torch.equal(out[1], torch.zeros(4).double())  # no history, no interest
        behaviours[0, 3:] = 99
        torch.testing.assert_close(pool(candidate, behaviours, valid), out)


def test_interest_grows_with_the_history_and_does_not_depend_on_its_order():
    pool = randomised(InterestPooling(4, (8,))).double().eval()
    candidate, behaviours = torch.randn(1, 4).double(), torch.randn(1, 6, 4).double()
    with torch.no_grad():
        once = pool(candidate, behaviours)
        torch.testing.assert_close(pool(candidate, torch.cat([behaviours, behaviours], 1)), 2 * once)
        torch.testing.assert_close(pool(candidate, behaviours.flip(1)), once)
        share = InterestPooling(4, (8,), softmax=True).double().eval()
        share.load_state_dict(pool.state_dict())
        torch.testing.assert_close(share(candidate, torch.cat([behaviours, behaviours], 1)),
                                   share(candidate, behaviours))


def test_weights_are_recorded():
    model = nn.ModuleDict({"pool": randomised(InterestPooling(4, (8,))).eval()})
    candidate, behaviours = torch.randn(2, 4), torch.randn(2, 5, 4)
    with torch.no_grad(), record(model) as r:
        out = model["pool"](candidate, behaviours)
    weights = r["pool"].parts[0].weights
    assert weights.shape == (2, 1, 1, 5)
    torch.testing.assert_close((weights[:, 0] @ behaviours)[:, 0], out)


def test_the_decay_is_of_what_the_batch_looks_up():
    weight, counts = torch.randn(6, 3, requires_grad=True), torch.tensor([1.0, 2, 3, 4, 5, 0])
    mini_batch_aware_decay(weight, torch.tensor([[1, 1, 4], [2, 1, 4]]), counts).backward()
    wanted = torch.zeros(6, 3)
    for feature in (1, 2, 4):
        wanted[feature] = weight[feature].detach() / counts[feature]
    torch.testing.assert_close(weight.grad, wanted)


def test_an_epoch_of_single_examples_decays_every_feature_that_occurs_once():
    """Summed over batches of one example, n_j of 1 / n_j: half of |w_j|^2, the decay of the whole data."""
    weight = torch.randn(9, 4, dtype=torch.float64)
    data = torch.stack([torch.randperm(8)[:3] for _ in range(40)])
    counts = torch.bincount(data.flatten(), minlength=9).double()
    epoch = sum(mini_batch_aware_decay(weight, example, counts) for example in data)
    torch.testing.assert_close(epoch, 0.5 * weight[counts > 0].square().sum())


def test_it_learns_that_a_click_repeats_a_behaviour():
    """A click where the candidate's category is in the history: no fixed vector of a user of many interests says so."""
    torch.manual_seed(0)
    model = DeepInterest((30,), (3,), dim=8, attention=(16,), hidden=(16,))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def draw(count):
        history, candidate = torch.randint(1, 30, (count, 6, 1)), torch.randint(1, 30, (count, 1))
        repeat = torch.rand(count) < 0.5
        candidate = torch.where(repeat[:, None], history[:, 0], candidate)
        history[:, 4:] = 0
        clicked = (history[:, :, 0] == candidate).any(1).float()
        return (candidate, history, torch.randint(3, (count, 1))), clicked

    for _ in range(300):
        inputs, clicked = draw(256)
        loss = F.binary_cross_entropy_with_logits(model(*inputs), clicked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, clicked = draw(2000)
    with torch.no_grad():
        right = ((model.eval()(*inputs) > 0) == (clicked > 0)).float().mean()
    assert right > 0.93
