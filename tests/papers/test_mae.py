"""MAE: only what is seen is computed, and guessing is learnt."""

from __future__ import annotations

import math

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.mae import MaskedAutoencoder
from saccade.parts.masking import Visible
from saccade.parts.pixels import normalised, patches_of
from saccade.parts.position import sincos
from tests.papers.learning import losses, ramps


def small(model, **options):
    return MaskedAutoencoder(model, dim=32, depth=1, heads=2, **options)


def test_hidden_patches_change_nothing_and_all_seen_is_the_host():
    torch.manual_seed(0)
    model = create_model("deit_nano").eval()
    visible, image = Visible(model, "mae"), torch.randn(2, 3, 32, 32)
    everything = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(visible(image, everything), model.forward_features(image))
    seen = torch.tensor([[3, 17, 40], [0, 1, 63]])
    other = image.clone()
    for row, kept in enumerate(seen.tolist()):
        for place in set(range(64)) - set(kept):
            y, x = 4 * (place // 8), 4 * (place % 8)
            other[row, :, y:y + 4, x:x + 4] = torch.randn(3, 4, 4)
    torch.testing.assert_close(visible(image, seen), visible(other, seen))
    assert visible(image, seen).shape == (2, 4, 64)


def test_loss_by_loops():
    torch.manual_seed(0)
    method, image = small(create_model("deit_nano")).eval(), torch.randn(2, 3, 32, 32)
    hidden = method.draw(image)
    assert hidden.sum(1).tolist() == [48, 48]
    guess, truth = method.guess(image, hidden), normalised(patches_of(image, 4))
    wrong = [((guess[b, n] - truth[b, n]) ** 2).mean() for b in range(2) for n in range(64) if hidden[b, n]]
    method.draw = lambda image: hidden
    torch.testing.assert_close(method(image)["loss"], torch.stack(wrong).mean())
    painted = method.reconstruct(image)
    shown = patches_of(painted, 4)
    assert torch.equal(shown[~hidden], patches_of(image, 4)[~hidden])
    torch.testing.assert_close(normalised(patches_of(image, 4))[hidden].mean(-1), torch.zeros(96), atol=1e-6, rtol=0)


def test_sines_and_cosines():
    """Written out: the last axis first, sines before cosines."""
    table = sincos((3, 5), 8)
    for y in range(3):
        for x in range(5):
            wanted = [math.sin(x), math.sin(x / 100), math.cos(x), math.cos(x / 100),
                      math.sin(y), math.sin(y / 100), math.cos(y), math.cos(y / 100)]
            torch.testing.assert_close(table[y, x], torch.tensor(wanted))
    assert torch.equal(sincos((3, 5), 10)[..., :8], table) and not sincos((3, 5), 10)[..., 8:].any()
    with pytest.raises(SaccadeError, match="give 4"):
        sincos((3, 5), 3)


def test_timms_host():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    method, image = small(model), torch.randn(2, 3, 64, 64)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(method.eval().visible(image, everything), model.forward_features(image))
    method(image)["loss"].backward()
    assert model.patch_embed.proj.weight.grad.abs().max() > 0


def test_guessing_is_learnt():
    torch.manual_seed(0)
    method = small(create_model("deit_nano"))
    images = ramps(16)
    found = losses(method, images, 40)
    assert found[-1] < 0.5 * found[0]


def test_bad_input():
    with pytest.raises(SaccadeError, match="choose a ViT or DeiT"):
        small(create_model("deit_nano", mixer="neighborhood", prefix_mode="none"))
    with pytest.raises(SaccadeError, match="plain vision transformer"):
        small(create_model("swin_nano"))
    with pytest.raises(SaccadeError, match="ratio=0"):
        small(create_model("deit_nano"), ratio=0)
    with pytest.raises(SaccadeError, match="34 x 32 pixels are no whole number of patches of 4"):
        small(create_model("deit_nano"))(torch.zeros(1, 3, 34, 32))
