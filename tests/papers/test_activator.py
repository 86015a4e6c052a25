"""What Activator's goldens do not show: tokens do not meet, prefix tokens are taken along."""

from __future__ import annotations

import torch

from saccade import Site, create_model
from saccade.papers.activator import ActivatorGating
from tests.contracts.registered import randomised


def test_the_order_of_patches_does_not_matter():
    """Nothing but the mean joins the tokens: patches in any order give the same scores."""
    model = randomised(create_model("activator_nano", num_classes=3)).double().eval()
    image = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, torch.randperm(6)]
    shuffled = patches.unflatten(2, (2, 3)).permute(0, 1, 2, 4, 3, 5).reshape_as(image)
    with torch.no_grad():
        torch.testing.assert_close(model(shuffled), model(image))


def test_prefix_tokens_are_tokens():
    mixer = randomised(ActivatorGating(Site(8)))
    x, prefix = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 8)
    with torch.no_grad():
        out, ahead = mixer(x, prefix)
        assert torch.equal(out, mixer(x))
        torch.testing.assert_close(ahead, mixer(prefix))


def test_without_feed_forward_the_unit_is_all():
    block = create_model("activator_only_geglu_nano").blocks[0]
    assert block.mlp is None
    x = torch.randn(1, 6, 64)
    with torch.no_grad():
        torch.testing.assert_close(block(x, 0, (2, 3)), x + block.mixer(block.norm(x)))
