"""Adventurer: every token sees every other, the class token stays last, pixels are tokens."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model
from saccade.papers.patch_scaling import CausalImage
from tests.contracts.registered import randomised


@pytest.mark.parametrize("backwards", [False, True])
def test_every_token_sees_every_other(backwards):
    mixer = randomised(CausalImage(Site(32, grid=(4, 4)), backwards)).double()
    x = torch.randn(1, 4, 4, 32, dtype=torch.float64, requires_grad=True)
    for place in [(0, 0), (2, 1), (3, 3)]:
        gradient, = torch.autograd.grad(mixer(x)[0][place].sum(), x)
        assert (gradient[0].abs().amax(-1) > 0).all()


def test_reading_from_the_end_leaves_prefix_tokens_last():
    ahead, back = (CausalImage(Site(32, grid=(6,)), backwards) for backwards in (False, True))
    back.load_state_dict(ahead.state_dict())
    x, prefix = torch.randn(2, 6, 32), torch.randn(2, 2, 32)
    out, out_prefix = ahead(x, prefix=prefix)
    reversed_out, reversed_prefix = back(x.flip(1), prefix=prefix)
    torch.testing.assert_close(reversed_out.flip(1), out)
    torch.testing.assert_close(reversed_prefix, out_prefix)


def test_features_are_the_grid_tokens_without_the_class_token():
    model = randomised(create_model("adventurer_nano")).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens = model.blocks[0](model.tokens(image)[0], 1, (8, 8))
        torch.testing.assert_close(model.features(image)[0].flatten(2).mT, tokens[:, :64])


def test_a_pixel_a_token():
    model = create_model("adventurer_tiny_patch1", img_size=12, num_classes=3)
    assert model.blocks[0].mixer.scan.conv.weight.shape[0] == 640 and model.position.shape == (1, 145, 256)
    assert model(torch.randn(1, 3, 12, 12)).shape == (1, 3)


def test_published_patch_sizes_differ_in_stem_and_positions_alone():
    with torch.device("meta"):
        coarse, fine = (create_model(f"adventurer_base_patch{patch}") for patch in (16, 8))
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (coarse, fine)]
    assert count[1] - count[0] == 768 * (3 * (8 * 8 - 16 * 16) + 28 * 28 - 14 * 14)
