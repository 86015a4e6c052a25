"""IA-RED2 beside the authors' masked form, and its rewards."""

from __future__ import annotations

import torch

from saccade import apply, create_model
from saccade.papers.ia_red2 import importance, reinforce_loss, reward
from tests.contracts.registered import randomised


def masked(model, image, layers):
    """Nothing leaves: dropped tokens are multiplied by 0 and hidden as keys. Scores, and the maps."""
    tokens, _ = model.tokens(image)
    policy, maps = torch.ones(tokens.shape[:2], dtype=tokens.dtype), []
    for number, block in enumerate(model.blocks):
        if number in layers:
            worth = block.interpreter(tokens) * policy
            maps.append(worth)
            policy = (worth > block.threshold).to(tokens.dtype)
            policy[:, 0] = 1
            tokens = tokens * policy[..., None]
        q, k, v = block.queries_keys_values(tokens)
        logits = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(policy[:, None, None] == 0, -torch.inf)
        tokens = block.add_mlp(block.add_mixed(tokens, logits.softmax(-1) @ v))
    return model.forward_head(model.norm(tokens)), maps


def test_dropping_is_the_masked_form():
    model = create_model("deit_nano", num_classes=5)
    apply(model, "ia_red2", layers=(0, 3), heads=4)
    model = randomised(model).double().eval()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        scores, maps = masked(model, image, (0, 3))
        torch.testing.assert_close(model(image), scores)
        for ours, theirs in zip(importance(model), maps, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert 0 < model.blocks[3].share.max() < 1


def test_rewards_and_their_gradient():
    right, share = torch.tensor([True, False, True]), torch.tensor([0.5, 0.1, 1.0])
    torch.testing.assert_close(reward(right, share, 0.5), torch.tensor([0.75, -0.5, 0.0]))
    chance = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    reinforce_loss(chance, torch.tensor([0.75, -0.5, 0.0]), torch.tensor([0.25, 0.5, 0.0])).backward()
    torch.testing.assert_close(chance.grad, torch.tensor([-0.5, 1.0, 0.0]) / 3)


def test_the_probability_of_a_sampled_choice():
    """The sum over tokens of the logarithm of what was decided for each."""
    model = create_model("deit_nano", num_classes=5)
    apply(model, "ia_red2", layers=(2,), heads=4)
    model.train()
    block = model.blocks[2]
    block.samples = True
    image = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    model(image)
    kept = block.kept.numbers
    for picture in range(2):
        stays = set(kept[picture][kept[picture] > 0].tolist())
        worth = block.importance[picture]
        wanted = sum(float((worth[token] if token in stays else 1 - worth[token]).log()) for token in range(1, 65))
        torch.testing.assert_close(float(block.log_probability[picture].detach()), wanted, rtol=1e-4, atol=1e-4)
    block.log_probability.sum().backward()
    assert block.interpreter.qk.weight.grad[:128].abs().max() > 0
