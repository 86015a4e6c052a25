"""CrossViT, beyond its goldens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, create_model
from saccade.core.index import resolve_model
from saccade.papers.crossvit import CARD
from saccade.tools.measure import declared_macs


@pytest.mark.parametrize("name, size, seen", [
    ("crossvit_9", (224, 224), [(240, 240), (224, 224)]),
    ("crossvit_9", (240, 240), [(240, 240), (224, 224)]),  # an image of 240 is one of 224
    ("crossvit_9", (448, 64), [(480, 72), (448, 64)]),
    ("crossvit_9", (100, 17), [(108, 24), (112, 32)]),
    ("crossvit_15_dagger_384", (384, 408), [(408, 408), (384, 384)]),
])
def test_what_the_branches_see(name, size, seen):
    with torch.device("meta"):
        model = create_model(name)
    assert [branch.resized(size) for branch in model.stem] == seen


def test_fixed_is_the_native_size_whatever_comes():
    """The authors' code: each branch resizes the image to its own sides."""
    torch.manual_seed(0)
    model = create_model("crossvit_nano", fixed=True, num_classes=5).eval()
    image = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        fine = model.stem[0](F.interpolate(image, size=(60, 60), mode="bicubic"))[0]
        assert torch.equal(model.stem[0](image)[0], fine)
        assert [tuple(value.shape[2:]) for value in model.features(image)] == [(20, 20)] * 3 + [(10, 10)] * 3


@pytest.mark.parametrize("name", ["crossvit_9_dagger_240", "crossvit_tiny_240"])
def test_timm_weights_give_timm_scores(name, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = create_model(name, checkpoint_path=tmp_path / "timm.pth").eval()
    image = torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["crossvit_small", "crossvit_9_dagger", "crossvit_18_dagger_384"])
def test_published_multiply_adds(name):
    with torch.device("meta"):
        model = create_model(name)
        image = torch.empty(1, 3, *[384 if "384" in name else 224] * 2)
    assert declared_macs(model, (image,)) == pytest.approx(CARD.macs[name], rel=0.05)


def test_names_and_bad_input():
    assert resolve_model("crossvit_9_224") == "crossvit_9" and resolve_model("crossvit_t") == "crossvit_tiny"
    with pytest.raises(SaccadeError, match="token"):
        create_model("crossvit_nano", global_pool="")
    with pytest.raises(SaccadeError, match="convolutional patches"):
        create_model("crossvit_nano", convolutions=True)
