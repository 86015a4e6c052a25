"""The same questions put to every method that trains a backbone without labels, on our hosts and timm's."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.core.index import index
from saccade.core.pretraining import KIND, Objective, pretraining
from tests.contracts.registered import over

HOSTS = {
    "plain": lambda: create_model("deit_nano", num_classes=0, img_size=32),
    "convnext": lambda: create_model("convnext_nano", num_classes=0, img_size=32),
    "swin": lambda: create_model("swin_nano", num_classes=0, img_size=32),
    "resnet": lambda: create_model("resnet_nano", num_classes=0, img_size=32),
    "modalities": lambda: create_model("multivit_nano", num_classes=0, img_size=32),
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=48,
                                      depth=2, num_heads=3),
}
# Options of a method on hosts so narrow, where its own are for larger ones.
OPTIONS: dict[str, dict[str, Any]] = {
    "mae": dict(dim=32, depth=1, heads=2),
    "multimae": dict(dim=32, depth=1, heads=2),
    "obow": dict(words=32),
    "sit_ssl": dict(out_dim=32, hidden=64, tasks=("restoration",)),  # thirty steps teach nothing of the others
    "spark": dict(width=32),
    "uni4eye": dict(dim=32, depth=1, heads=2),
}
METHODS = sorted(name for name, paper in index()["methods"].items() if KIND in index()["papers"][paper]["kinds"])


def objective(name: str, where: str) -> nn.Module:
    """The method around a host with weights of its own; the test is over where it does not take such a host."""
    torch.manual_seed(0)
    try:
        return pretraining(HOSTS[where](), name, **OPTIONS.get(name, {})).train()
    except SaccadeError as error:
        assert len(str(error).splitlines()) == 1
        pytest.skip(str(error))


def pictures(of: nn.Module, count: int = 16) -> torch.Tensor:
    """Smooth shapes of several kinds, and, for a method of several views, each with a little noise in each view."""
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    whole = nn.functional.interpolate(small, size=(32, 32), mode="bicubic")
    views = getattr(of, "views", 1)
    if views == 1:
        return whole
    return whole[:, None] + 0.1 * torch.randn(count, views, 3, 32, 32, generator=generator)


def test_every_method_takes_a_host():
    assert METHODS
    for name in METHODS:
        taken = 0
        for make in HOSTS.values():
            try:
                pretraining(make(), name, **OPTIONS.get(name, {}))
                taken += 1
            except SaccadeError:
                continue
        assert taken, f"{name} takes none of {', '.join(HOSTS)}"


@pytest.mark.parametrize("where", HOSTS)
@over("test_objective", METHODS)
def test_objective(name, where):
    """Finite scalars whose gradient reaches the model; the model is the caller's own, and nothing is left on it."""
    method = objective(name, where)
    assert isinstance(method, Objective)
    keys = set(HOSTS[where]().state_dict())
    assert set(method.model.state_dict()) == keys
    found = method(pictures(method))
    assert all(value.ndim == 0 and value.isfinite() for value in found.values())
    found["loss"].backward()
    gradients = {key: parameter.grad for key, parameter in method.model.named_parameters() if parameter.requires_grad}
    reached = [key for key, gradient in gradients.items() if gradient is not None and gradient.abs().max() > 0]
    assert len(reached) > 0.6 * len(gradients), sorted(set(gradients) - set(reached))
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


@pytest.mark.parametrize("where", HOSTS)
@over("test_learns_and_repeats", METHODS)
def test_learns_and_repeats(name, where):
    """A few steps on sixteen pictures lower the loss, and under one seed they do so to the same bits."""
    curves = []
    for steps in (30, 3):
        method = objective(name, where)
        images, losses = pictures(method), []
        optimizer = torch.optim.AdamW([each for each in method.parameters() if each.requires_grad], 1e-3)
        torch.manual_seed(2)
        for step in range(steps):
            loss = method(images)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if hasattr(method, "after_step"):
                method.after_step((step + 1) / steps)
            losses.append(loss.item())
        curves.append(losses)
    longer, shorter = curves
    if not hasattr(objective(name, where), "after_step"):  # its step may depend on how long training lasts
        assert longer[:3] == shorter
    assert sum(longer[-5:]) < sum(longer[:5])


@over("test_unsuitable_host", METHODS)
def test_unsuitable_host(name):
    for host in (nn.Conv2d(3, 3, 3), create_model("hat_s_x2")):
        with pytest.raises(SaccadeError) as error:
            pretraining(host, name, **OPTIONS.get(name, {}))
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(SaccadeError, match="has no option 'flux'"):
        pretraining(HOSTS["plain"](), name, flux=1)


def test_unknown_method():
    with pytest.raises(SaccadeError, match="no pretraining method 'rotnt'; did you mean rotnet"):
        pretraining(HOSTS["plain"](), "rotnt")
