"""Every method of pre-training: it trains the hosts that it takes, and refuses others in one line."""

from __future__ import annotations

import copy

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.core.pretraining import list_pretraining, pretraining

METHODS = list_pretraining()
HOSTS = ("deit_nano", "convnext_nano", "swin_nano", "resnet_nano", "multivit_nano", "timm:resnet18", "timm:vit_tiny")
# Options for narrow hosts, and how many of HOSTS a method takes at least.
NARROW = {
    "mae": (dict(dim=32, depth=1, heads=2), 2),
    "multimae": (dict(dim=32, depth=1, heads=2), 1),
    "obow": (dict(words=32), 3),
    "rotnet": ({}, 6),
    "simmim": ({}, 5),
    "sit_ssl": (dict(out_dim=32, hidden=64), 2),
    "spark": (dict(width=32), 3),
    "uni4eye": (dict(dim=32, depth=1, heads=2), 2),
}


def host(name):
    if not name.startswith("timm:"):
        return create_model(name, num_classes=0)
    timm = pytest.importorskip("timm")
    if name == "timm:resnet18":
        return timm.create_model("resnet18", num_classes=0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=2)


def batch(objective, name, count=8):
    torch.manual_seed(1)
    side = 64 if name.startswith("timm:") else 32
    views = getattr(objective, "views", 1)
    palette = torch.randn(count, 1, 3, 1, 1)
    images = (palette + 0.3 * torch.randn(count, views, 3, side, side))
    return images if views > 1 else images[:, 0]


def test_every_method_is_here():
    assert set(METHODS) == set(NARROW)


@pytest.mark.parametrize("method", METHODS)
def test_hosts(method):
    options, least = NARROW[method]
    taken = 0
    for name in HOSTS:
        torch.manual_seed(0)
        model = host(name)
        try:
            objective = pretraining(model, method, **options).train()
        except SaccadeError as error:
            assert "\n" not in str(error)
            continue
        taken += 1
        assert objective.model is model
        images = batch(objective, name)
        torch.manual_seed(2)
        twin = copy.deepcopy(objective)
        out = objective(images)
        assert out["loss"].ndim == 0 and all(value.isfinite().all() for value in out.values())
        torch.manual_seed(2)
        torch.testing.assert_close(twin(images)["loss"], out["loss"])
        out["loss"].backward()
        first = next(parameter for parameter in model.parameters() if parameter.ndim == 4)
        assert first.grad.isfinite().all() and first.grad.abs().max() > 0, name
        if hasattr(objective, "after_step"):
            objective.after_step(0.5)
        if hasattr(objective, "reconstruct") and not isinstance(images, dict):
            with torch.no_grad():
                one = images if images.ndim == 4 else images[:, 0]
                assert objective.eval().reconstruct(one).shape == one.shape
    assert taken >= least


@pytest.mark.parametrize("method", METHODS)
def test_a_host_that_is_no_backbone(method):
    with pytest.raises(SaccadeError):
        pretraining(torch.nn.Conv2d(3, 8, 3), method, **NARROW[method][0])


def test_names_and_options():
    with pytest.raises(SaccadeError, match="there is no pretraining method 'mea'"):
        pretraining(host("deit_nano"), "mea")
    with pytest.raises(SaccadeError, match="has no option 'ratoi'"):
        pretraining(host("deit_nano"), "mae", ratoi=0.5)
