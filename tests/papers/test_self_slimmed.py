"""SiT: what slimming keeps, what its reverse gives back, and the distillation."""

from __future__ import annotations

import pytest
import torch

from saccade import create_model
from saccade.core.keymap import rename
from saccade.papers.self_slimmed import (
    AUTHORS,
    SIZES,
    TokenSlimming,
    recalibration_loss,
    sit_lvvit,
    slimmed_counts,
)


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


@pytest.mark.parametrize("name", SIZES)
def test_authors_names_of_every_size(name):
    """Their reverse modules are counted by blocks, and the stem of the largest has two convolutions more."""
    with torch.device("meta"):
        ours = {key for key in create_model(name).state_dict()
                if key.startswith(("reverse.", "stem.")) and "num_batches" not in key}
    stages, parts = SIZES[name]["stages"], ("norm1", "mlp1.fc1", "mlp1.fc2", "norm2", "mlp2.fc1", "mlp2.fc2")
    blocks, convs = range(stages[0] - 1, sum(stages)), range(1, 7 if name == "sit_lvvit_large" else 5)
    theirs = [f"rtsm.{block}.{part}.{kind}" for block in blocks for part in parts for kind in ("weight", "bias")]
    theirs += [f"patch_embed.conv{conv}.weight" for conv in convs]
    theirs += [f"patch_embed.bn{conv}.{kind}" for conv in convs
               for kind in ("weight", "bias", "running_mean", "running_var")]
    assert set(rename(dict.fromkeys(theirs, torch.zeros(1)), AUTHORS(name)).state) == ours


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
