"""SparK: nothing hidden is seen, hosts that would see it are refused, and guessing is learnt."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.spark import SparK
from saccade.parts.masking import spread
from tests.papers.learning import losses, ramps


@pytest.mark.parametrize("name", ["convnext_nano", "resnet_nano", "inceptionnext_nano", "poolformer_nano"])
def test_what_is_hidden_changes_nothing(name):
    torch.manual_seed(0)
    method = SparK(create_model(name), width=32).train()
    active = method.draw(torch.zeros(2, 3, 32, 32))
    pixels = spread(active, (32, 32))[:, None]
    image, other = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    mixed = torch.where(pixels, image, other)
    for one, two in zip(method.maps(image, active), method.maps(mixed, active), strict=True):
        torch.testing.assert_close(one, two)
        assert one.abs().amax(1)[~spread(active, tuple(one.shape[2:]))].max() == 0
        assert one.std() > 0.01


def test_all_seen_is_the_dense_network():
    model = create_model("convnext_nano").eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        sparse = SparK(model, width=32).eval().maps(image, torch.ones(1, 4, 4, dtype=torch.bool))
        for one, two in zip(sparse, model.features(image), strict=True):
            torch.testing.assert_close(one, two)


def test_batch_norm_counts_visible_places_alone():
    """Running statistics after one step: those of the visible places of the first map, found by loops."""
    torch.manual_seed(0)
    model = create_model("resnet_nano")
    method = SparK(model, width=32).train()
    image = torch.randn(3, 3, 32, 32)
    active = method.draw(image)
    stem = model.stem
    with torch.no_grad():
        first = stem[0]((image * spread(active, (32, 32))[:, None]).movedim(1, -1))
    seen = spread(active, tuple(first.shape[1:3]))
    rows = torch.stack([first[b, i, j] for b in range(3) for i in range(first.shape[1]) for j in range(first.shape[2])
                        if seen[b, i, j]])
    stem[1].reset_running_stats()
    method.maps(image, active)
    torch.testing.assert_close(stem[1].running_mean, 0.1 * rows.mean(0))
    torch.testing.assert_close(stem[1].running_var, 0.9 + 0.1 * rows.var(0))


@pytest.mark.parametrize("name", ["convnext_nano", "resnet_nano"])
def test_picked_places_give_the_same(name, monkeypatch):
    """Layers of one place on the visible places alone, of the host as of all of them."""
    torch.manual_seed(0)
    method = SparK(create_model(name), width=32).train()
    image = torch.randn(2, 3, 32, 32)
    active = method.draw(image)
    found = {}
    for wide in (1, 10**9):
        monkeypatch.setattr("saccade.papers.spark.WIDE", wide)
        maps = method.maps(image, active)
        method.zero_grad()
        sum(one.square().mean() for one in maps).backward()
        found[wide] = maps, [p.grad.clone() for p in method.model.parameters() if p.grad is not None]
    for one, other in zip(found[1], found[10**9], strict=True):
        assert len(one) == len(other) > 1
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_timms_hosts():
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "convnext_atto"):
        method = SparK(timm.create_model(name, num_classes=0), width=64).train()
        out = method(torch.randn(2, 3, 64, 64))
        out["loss"].backward()
        first = next(p for p in method.model.parameters() if p.ndim == 4)
        assert 0.5 < out["loss"] < 3 and first.grad.abs().max() > 0


@pytest.mark.parametrize("name, message", [
    ("swin_nano", "leak"), ("ninformer_nano", "pyramid"), ("deit_nano", "pyramid"), ("affnet_nano", "leak"),
])
def test_hosts_that_see_what_is_hidden(name, message):
    with pytest.raises(SaccadeError, match=message):
        SparK(create_model(name), width=32)


def test_guessing_is_learnt():
    torch.manual_seed(0)
    method = SparK(create_model("convnext_nano"), width=32).train()
    images = ramps(16)
    found = losses(method, images, 30)
    assert found[-1] < 0.5 * found[0]
    painted = method.eval().reconstruct(images)
    assert painted.shape == images.shape and (painted == images).float().mean() > 0.3


def test_wrong_sizes():
    method = SparK(create_model("convnext_nano"), width=32)
    with pytest.raises(SaccadeError, match="36 x 32 pixels are no whole number"):
        method(torch.zeros(1, 3, 36, 32))
    with pytest.raises(SaccadeError, match="halved 3 times"):
        SparK(create_model("convnext_nano"), width=20)
    with pytest.raises(SaccadeError, match="ratio=1.0"):
        SparK(create_model("convnext_nano"), ratio=1.0)
