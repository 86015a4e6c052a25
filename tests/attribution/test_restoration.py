"""Local attribution finds the pixels that were planted, and only them; indices and curves against slow forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.attribution.restoration import (
    Patch,
    blurred,
    detail,
    diffusion_index,
    feature_intensity,
    local_attribution,
)


def picture(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Planted(nn.Module):
    """What stands at a place of the result stood 7 rows lower and 5 columns to the right, in green alone."""

    def forward(self, image):
        return torch.roll(image[:, 1:2], (-7, -5), (2, 3)).sin().repeat(1, 3, 1, 1)


def test_only_the_planted_pixels_count():
    found = local_attribution(Planted(), picture(), Patch(4, 6, 8))
    seen = torch.zeros(3, 32, 32, dtype=torch.bool)
    seen[1, 11:19, 11:19] = True
    assert (found[:, ~seen] == 0).all()
    inside = seen.clone()
    inside[1, 18, 18] = False  # the far corner has no neighbour to differ from
    assert (found[:, inside].abs() > 0).all()


def test_contributions_add_up_to_the_detail():
    """The sum over all pixels is D(image) - D(blurred); more steps come nearer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double()
    image, patch = picture(), Patch(8, 8, 12)
    with torch.no_grad():
        expected = detail(model(image), patch) - detail(model(blurred(image, 1.2)), patch)
    errors = [(local_attribution(model, image, patch, steps).sum((1, 2, 3)) - expected).abs() for steps in (50, 200)]
    assert (errors[0] < 0.01 * expected.abs()).all() and (errors[1] < 0.3 * errors[0]).all()


def test_a_wider_network_has_a_larger_index():
    indices = []
    for radius in (1, 3, 7):
        conv = nn.Conv2d(3, 3, 2 * radius + 1, padding=radius).double()
        nn.init.constant_(conv.weight, 1 / conv.weight[0].numel())
        conv.weight.data += 0.01 * torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(0))
        indices.append(diffusion_index(local_attribution(conv, picture(), Patch(12, 12, 6), steps=10)))
    assert (indices[0] < indices[1]).all() and (indices[1] < indices[2]).all()


def test_diffusion_index_is_that_of_gini():
    values = picture(6)
    shown = values.abs().sum(1).flatten(1)
    differences = (shown[:, :, None] - shown[:, None]).abs().sum((1, 2))
    gini = differences / (2 * 36**2 * shown.mean(1))
    torch.testing.assert_close(diffusion_index(values), 100 * (1 - gini))
    assert diffusion_index(torch.ones(1, 8, 8)).item() == pytest.approx(100)
    one = torch.zeros(1, 8, 8)
    one[0, 3, 4] = -2
    assert diffusion_index(one).item() == pytest.approx(100 / 64)
    with pytest.raises(SaccadeError, match="zeros"):
        diffusion_index(torch.zeros(1, 8, 8))


def test_blur():
    image = picture(9)[:, :1]
    torch.testing.assert_close(blurred(image, 1e-9), image)
    torch.testing.assert_close(blurred(torch.full_like(image, 0.3), 1.2), torch.full_like(image, 0.3))
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[..., 4, 4] = 1
    away = torch.arange(-4, 5, dtype=torch.float64)
    bell = torch.exp(-(away[:, None] ** 2 + away**2) / (2 * 1.2**2))
    torch.testing.assert_close(blurred(point, 1.2)[0, 0], bell / bell.sum())


def test_feature_intensity_along_depth():
    torch.manual_seed(0)
    model, image = create_model("hat_nano_x2").train(), picture(16).float()
    seen = []
    handles = [group.register_forward_hook(lambda module, inputs, output: seen.append(output))
               for group in model.groups]
    curve = feature_intensity(model, image)
    assert [one.layer for one in curve] == ["groups.0", "groups.1"] and model.training
    for one, output in zip(curve, seen, strict=True):
        assert one.mean == pytest.approx(float(output.abs().mean()))
        assert one.largest == pytest.approx(float(output.abs().max()))
        assert one.deviation == pytest.approx(float(output.std()))
    for handle in handles:
        handle.remove()
    assert [one.layer for one in feature_intensity(model, image, "groups.1.blocks.?")] == [
        "groups.1.blocks.0", "groups.1.blocks.1"]
    with pytest.raises(SaccadeError, match="matches no module"):
        feature_intensity(model, image, "stages.*")
    with pytest.raises(SaccadeError, match="Planted has no groups"):
        feature_intensity(Planted(), image)


def test_a_real_network_and_bad_patches():
    torch.manual_seed(0)
    model, image = create_model("hat_nano_x2"), picture(16).float()
    found = local_attribution(model, image, Patch(10, 10, 8), steps=2)
    assert found.shape == image.shape and found.isfinite().all() and (found != 0).any()
    assert model.training
    for patch in (Patch(0, 0, 1), Patch(-1, 0, 4), Patch(30, 0, 4)):
        with pytest.raises(SaccadeError, match="does not lie in the restored picture of 32x32"):
            local_attribution(model, image, patch)
