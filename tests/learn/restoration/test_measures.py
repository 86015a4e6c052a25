"""PSNR and SSIM: known values, a slow form, scikit-image's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saccade import SaccadeError
from saccade.learn.restoration.measures import brightness, levels, quality


def gray(level: float, side: int = 32) -> torch.Tensor:
    return torch.full((1, 3, side, side), level / 255)


def test_known_values():
    """Flat colours: all of PSNR and SSIM is then a formula of two numbers."""
    found = quality(gray(110), gray(100))
    assert found["psnr_rgb"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-9)  # 28.1308 dB
    assert found["psnr_y"] == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)), abs=1e-9)  # 29.4527 dB
    c1 = (0.01 * 255) ** 2
    assert found["ssim_rgb"] == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), abs=1e-9)


def test_brightness_of_pure_colours():
    """As MATLAB's rgb2ycbcr: black 16, white 235, red 81.481, green 144.553, blue 40.966."""
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).double()[..., None, None] * 255
    assert brightness(colours).flatten().tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_equals_scikit_image():
    metrics, data = pytest.importorskip("skimage.metrics"), pytest.importorskip("skimage.data")
    truth = data.chelsea()[100:180, 100:200]
    made = (truth + np.random.default_rng(0).normal(0, 12, truth.shape)).clip(0, 255).round().astype(np.uint8)
    found = quality(*(torch.from_numpy(x / 255).movedim(-1, 0)[None] for x in (made, truth)), border=4)
    inside = (slice(4, -4), slice(4, -4))
    settings = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    made, truth = made[inside].astype(float), truth[inside].astype(float)
    assert found["psnr_rgb"] == pytest.approx(metrics.peak_signal_noise_ratio(truth, made, data_range=255), abs=1e-9)
    assert found["ssim_rgb"] == pytest.approx(
        metrics.structural_similarity(truth, made, channel_axis=2, **settings), abs=1e-9)
    ours, theirs = (16 + x @ [65.481, 128.553, 24.966] / 255 for x in (made, truth))
    assert found["psnr_y"] == pytest.approx(metrics.peak_signal_noise_ratio(theirs, ours, data_range=255), abs=1e-9)
    assert found["ssim_y"] == pytest.approx(metrics.structural_similarity(theirs, ours, **settings), abs=1e-9)


def test_the_border_is_cut_and_levels_are_whole():
    truth = torch.rand(2, 3, 24, 24)
    spoiled = truth.clone()
    spoiled[..., :4, :] = spoiled[..., -4:] = 0
    assert quality(spoiled, truth, border=4)["psnr_rgb"] == math.inf
    assert quality(spoiled, truth, border=3)["psnr_rgb"] < 40
    assert levels(torch.tensor([-0.1, 0.5, 1.2, 100.4 / 255])).tolist() == [0, 128, 255, 100]


def test_pictures_that_cannot_be_compared():
    with pytest.raises(SaccadeError, match="cannot be compared"):
        quality(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))
    with pytest.raises(SaccadeError, match="SSIM needs 11x11"):
        quality(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), border=3)
