"""Where an attribution cannot be: cells that are not connected get none; scores of known maps are known."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from saccade import SaccadeError, create_model
from saccade.papers.attribution_evaluation import (
    LAYER_METHODS,
    GridSetting,
    aggregate,
    cells,
    localization,
    smooth,
    stitch,
)

with torch.random.fork_rng():
    torch.manual_seed(0)  # under some weights Grad-CAM's slopes are all negative, and its map is nothing
    MODEL = create_model("resnet_nano", num_classes=5).eval()


def grid(count=2, side=64, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", LAYER_METHODS)
@pytest.mark.parametrize("layer", [0, 2])
def test_difull_gives_other_cells_nothing(method, layer):
    """But for weights that are pooled over the grid: the failure of Grad-CAM that the paper shows."""
    maps = GridSetting(MODEL, "difull").attribute(grid(), torch.tensor([1, 4]), 3, layer, method)
    parts = cells(maps[:, None], 2)
    assert (parts[:3].abs().max() == 0) == (method not in ("gradcam", "gradcam_plus_plus"))
    assert parts[3].abs().max() > 0


def test_other_cells_move_the_scores_only_where_connected():
    x, other = grid(), grid()
    other[:, :, :32] = 0
    full, whole = GridSetting(MODEL, "difull"), GridSetting(MODEL, "gridpg")
    assert_close(full(x, 3), full(other, 3), rtol=0, atol=0)
    assert (whole(x, 3) - whole(other, 3)).abs().max() > 1e-4


@pytest.mark.parametrize("setting", ["gridpg", "difull", "dipart"])
def test_one_cell_is_the_plain_model_and_splits_agree(setting):
    assert_close(GridSetting(MODEL, setting, n=1)(grid()), MODEL(grid()))
    four = GridSetting(MODEL, setting)
    for layer in (1, 2, 3):
        assert_close(four.scores(four.activation(grid(), layer), layer, 3), four(grid(), 3))


def test_cells_are_stitched_back():
    assert_close(stitch(cells(grid(), 2), 2), grid(), rtol=0, atol=0)
    assert_close(cells(grid(), 2)[1], grid()[:, :, :32, 32:], rtol=0, atol=0)


def test_localization_of_known_maps():
    size = (24, 24)
    assert_close(localization(torch.ones(2, 6, 6), 3, 2, size), torch.full((2,), 0.25))
    assert localization(-torch.ones(1, 6, 6), 0, 2, size).item() == 0
    maps = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) - 0.3
    assert_close(localization(5 * maps, 1, 2, size), localization(maps, 1, 2, size))
    assert_close(sum(localization(maps, cell, 2, size) for cell in range(4)), torch.ones(3))


def test_bins_average_to_the_mean_and_fall():
    maps = torch.rand(10, 4, 4, generator=torch.Generator().manual_seed(1))
    bins = (0, 0.2, 0.5, 1)
    found = aggregate(maps, 0, 2, (4, 4), bins)
    weight = torch.tensor([0.2, 0.3, 0.5])
    assert_close((weight[:, None, None] * found).sum(0), maps.mean(0))
    shares = localization(found, 0, 2, (4, 4))
    assert shares[0] > shares[1] > shares[2]


def test_smoothing_keeps_the_mass_and_one_pixel_is_the_identity():
    maps = torch.zeros(1, 21, 21)
    maps[0, 10, 10] = 3
    assert_close(smooth(maps, 1), maps)
    assert_close(smooth(maps, 9).sum(), torch.tensor(3.0))
    assert_close(smooth(maps, 9)[0, 10, 11] / smooth(maps, 9)[0, 10, 10], torch.tensor(-1 / (2 * 2.25**2)).exp())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GridSetting(MODEL, "full"), "setting='full'"),
        (lambda: GridSetting(create_model("deit_nano")), "no stages"),
        (lambda: cells(grid(side=63), 2), r"\(63, 63\)"),
        (lambda: localization(torch.ones(1, 4, 4), 4, 2, (4, 4)), "cell is 4"),
        (lambda: aggregate(torch.ones(5, 4, 4), 0, 2, (4, 4)), "empty"),
        (lambda: smooth(torch.ones(1, 4, 4), 4), "kernel is 4"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(SaccadeError, match=message):
        call()
