"""The effective receptive field of networks where it is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.attribution.receptive_field import area_ratio, effective_receptive_field
from saccade.core.features import Backbone


class Convolutions(Backbone):
    """`depth` convolutions of a kernel of ones."""

    def __init__(self, kernel, depth):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(1, 1, kernel, padding=kernel // 2, bias=False) for _ in range(depth)))
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def features(self, image):
        return [self.layers(image)]


def field_of(kernel, depth, side=33):
    return effective_receptive_field(Convolutions(kernel, depth), [torch.ones(2, 1, side, side)])


def test_one_convolution_is_a_box():
    field = field_of(5, 1)
    assert torch.equal(field.nonzero().amin(0), torch.tensor([14, 14])) and (field > 0).sum() == 25
    assert torch.equal(field[14:19, 14:19], torch.full((5, 5), float(field[16, 16])))
    assert area_ratio(field, 0.99) == pytest.approx(25 / 33**2)
    assert area_ratio(field, 0.3) == pytest.approx(9 / 33**2)


def test_a_stack_is_a_bump_and_a_large_kernel_sees_more():
    bump = field_of(3, 5)
    assert (bump > 0).sum() == 11**2 and bump[16, 16] > 3 * bump[16, 13]
    ratios = [area_ratio(bump, share) for share in (0.2, 0.5, 0.99)]
    assert ratios == sorted(ratios)
    assert area_ratio(field_of(11, 1), 0.5) > area_ratio(bump, 0.5)  # the same reach, used evenly


def test_large_kernels_see_more_even_before_training():
    torch.manual_seed(0)
    images = [torch.randn(2, 3, 64, 64)]
    small = create_model("unireplknet_nano", kernels=((3,), (3, 3), (3, 3)), layer_scale=1.0)
    large = create_model("unireplknet_nano", kernels=((3,), (13, 13), (13, 13)), layer_scale=1.0)
    assert area_ratio(effective_receptive_field(large, images), 0.5) > area_ratio(
        effective_receptive_field(small, images), 0.5)
    assert large.training  # as it was


def test_bad_input():
    with pytest.raises(SaccadeError, match="no image"):
        effective_receptive_field(create_model("unireplknet_nano"), [])
    with pytest.raises(SaccadeError, match="share=1.5"):
        area_ratio(torch.ones(3, 3), 1.5)
