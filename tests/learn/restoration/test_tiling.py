"""Tiles give what the whole picture gives, and show no seams where they cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.learn.restoration.tiling import Bicubic, fade, restored_rows, self_ensemble, starts


def whole(restore, pixels, **options) -> torch.Tensor:
    options = dict(scale=1, tile=64, overlap=16, dtype=torch.float64) | options
    tops, parts = zip(*restored_rows(restore, pixels, **options))
    assert list(tops) == np.cumsum([0, *(part.shape[1] for part in parts[:-1])]).tolist()
    return torch.cat(parts, 1)


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape)


def local(radius: int) -> nn.Module:
    """A nonlinear network that sees `radius` pixels far, borders padded with zeros."""
    torch.manual_seed(0)
    layers = [layer for _ in range(radius) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (200, 77), (112, 113), (1, 300), (5, 3)])
def test_a_network_that_sees_a_quarter_of_the_overlap_gives_the_same(size):
    pixels, model = picture(*size, 3), local(4)
    expected = model(torch.from_numpy(pixels).movedim(-1, 0)[None])[0]
    torch.testing.assert_close(whole(model, pixels), expected, rtol=0, atol=1e-12)


def test_one_that_sees_farther_does_not_but_has_no_seams():
    """Across tile borders the result jumps no more than elsewhere; tiles put edge to edge do jump."""
    pixels, model = np.full((200, 200, 3), 0.5), local(24)
    expected = model(torch.from_numpy(pixels).movedim(-1, 0)[None])[0]
    made = whole(model, pixels)
    assert (made - expected).abs().max() > 1e-9
    steps = torch.diff(made[:, 32:-32, 32:-32], dim=2).abs().amax((0, 1))
    hard = whole(model, pixels, overlap=0)
    assert steps.max() < 0.1 * torch.diff(hard[:, 32:-32, 32:-32], dim=2).abs().amax()


@pytest.mark.parametrize("scale", [2, 3])
def test_bicubic_in_tiles(scale):
    pixels = picture(150, 90, 2)
    expected = Bicubic(scale)(torch.from_numpy(pixels).movedim(-1, 0)[None])[0]
    torch.testing.assert_close(whole(Bicubic(scale), pixels, scale=scale), expected, rtol=0, atol=1e-12)


def test_windows_of_tiles_lie_as_in_the_whole_picture():
    """A network of windows alone, no shift: exact, since tiles begin at multiples of the window."""

    def windows(image: torch.Tensor) -> torch.Tensor:
        return image - nn.functional.interpolate(nn.functional.avg_pool2d(image, 8, ceil_mode=True), scale_factor=8)

    pixels = picture(128, 192, 3)
    expected = windows(torch.from_numpy(pixels).movedim(-1, 0)[None])[0]
    torch.testing.assert_close(whole(windows, pixels, tile=64, overlap=20, multiple=8), expected, rtol=0, atol=1e-12)


def test_a_narrow_hat_has_no_seams():
    """On a real picture, across the middle of the overlaps: tiled less whole jumps by less than half a level."""
    data = pytest.importorskip("skimage.data")
    torch.manual_seed(0)
    model = create_model("hat_nano_x2").eval()
    pixels = data.astronaut()[:112, 150:310]
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255)[0]
    made = whole(model, pixels, scale=2, tile=64, overlap=32, multiple=model.multiple, dtype=torch.float32)
    assert made.shape == expected.shape
    error = made - expected
    jumps = max(torch.diff(error, dim=axis).abs().max() for axis in (1, 2))
    assert jumps < 0.5 / 255


def test_self_ensemble_turns_with_the_picture():
    image = torch.rand(1, 3, 12, 20, dtype=torch.float64)
    restore = self_ensemble(local(3))
    made = restore(image)
    torch.testing.assert_close(restore(torch.rot90(image, 1, (-2, -1))), torch.rot90(made, 1, (-2, -1)))
    torch.testing.assert_close(restore(image.flip(-1)), made.flip(-1))
    assert not torch.allclose(local(3)(image), made)


def test_fade_and_starts():
    share = fade(32, torch.float64)
    assert share[:8].abs().max() == 0 and (share[24:] == 1).all()
    torch.testing.assert_close(share + share.flip(0), torch.ones(32, dtype=torch.float64))
    for side in range(1, 400):
        begin = starts(side, 64, 48)
        assert begin[-1] + 64 >= side and (len(begin) == 1 or begin[-2] + 64 < side)


def test_tiles_that_do_not_advance():
    with pytest.raises(SaccadeError, match="tile=32 with overlap=32: .* as in a tile of 64"):
        next(restored_rows(nn.Identity(), picture(8, 8, 3), scale=1, tile=32, overlap=32, multiple=16))
