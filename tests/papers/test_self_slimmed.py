"""SiT: what slimming keeps, what its reverse gives back, and the distillation."""

from __future__ import annotations

import torch

from saccade import create_model
from saccade.papers.self_slimmed import TokenSlimming, recalibration_loss, sit_lvvit, slimmed_counts


def test_slimming_gives_mixtures_of_tokens():
    """Weights of each new token sum to one over the old ones: equal tokens stay what they are."""
    slim = TokenSlimming(8, 3).double()
    x = torch.randn(2, 1, 8, dtype=torch.float64).expand(-1, 7, -1)
    torch.testing.assert_close(slim(x), x[:, :3])
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    logits = [[float(slim.scale) * float(slim.mlp(slim.norm(x))[0, token, new]) for token in range(7)]
              for new in range(3)]
    wanted = torch.stack([torch.tensor(row, dtype=torch.float64).softmax(0) @ x[0] for row in logits])
    torch.testing.assert_close(slim(x)[0], wanted)


def test_counts():
    assert slimmed_counts(196, 0.5, 3) == [98, 49, 24] and slimmed_counts(4, 0.1, 2) == [1, 1]


def test_recovered_tokens_learn_from_a_teacher():
    """Every block from the first slimming on is grown back to the whole grid, and the loss reaches all that slims."""
    model = sit_lvvit(32, (2, 1, 1), 2, img_size=64, num_classes=3)
    image = torch.randn(2, 3, 64, 64)
    scores, grown = model.recovered(image)
    assert scores.shape == (2, 3) and [tokens.shape for tokens in grown] == [(2, 16, 32)] * 3
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.recovered(image)[0], model(image))
    teacher = [torch.randn(2, 16, 32) for _ in grown]
    wanted = sum(float(((ours - theirs) ** 2).mean()) for ours, theirs in zip(grown, teacher, strict=True)) / 3
    loss = recalibration_loss(grown, teacher)
    torch.testing.assert_close(float(loss.detach()), wanted)
    loss.backward()
    assert all(model.blocks[number].slim.mlp[2].weight.grad.abs().max() > 0 for number in (1, 2))


def test_the_published_sizes_slim_where_they_say():
    model = create_model("sit_lvvit_small", img_size=64).eval()
    with torch.no_grad():
        tokens, grid = model.tokens(torch.zeros(1, 3, 64, 64))
        counts = []
        for block in model.blocks:
            tokens = block(tokens, 1, grid)
            counts.append(tokens.shape[1] - 1)
    assert counts == [16] * 8 + [8] * 3 + [4] * 2 + [2] * 3
