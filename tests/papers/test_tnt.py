"""TNT, beyond its goldens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import create_model
from saccade.core.keymap import rename
from saccade.papers.tnt import CARD, TIMM, Words, tnt
from saccade.tools.measure import declared_macs


def test_words_see_zeros_beyond_their_patch():
    torch.manual_seed(0)
    stem, image = Words(2, 3, 5, patch=8, stride=4).double(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    words = stem(image)
    assert words.shape == (2, 2, 3, 2, 2, 5)
    patch = image[1:, :, 8:16, 16:24]
    alone = F.conv2d(patch, stem.proj.weight, stem.proj.bias, stride=4, padding=3)
    torch.testing.assert_close(words[1, 1, 2], alone[0].permute(1, 2, 0))


def test_patches_of_a_volume():
    model = create_model("tnt_nano", img_size=(8, 12, 8), num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 8, 12, 8)).shape == (1, 3)
        assert [tuple(value.shape[2:]) for value in model.features(torch.randn(1, 3, 9, 12, 8))] == [(3, 3, 2)] * 4


def test_timm_weights_give_timm_scores():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("tnt_s_patch16_224", depth=2).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = tnt(384, 2, 6, 24, 4).eval()
    ours.load_state_dict(rename(theirs.state_dict(), TIMM).state)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    assert declared_macs(model, (image,)) == pytest.approx(CARD.macs[name], rel=0.05)
