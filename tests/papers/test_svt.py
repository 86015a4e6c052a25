"""Scattering: its complex arithmetic, its limits, other grids; where the networks scatter."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model
from saccade.ops.wavelet import dtcwt, inverse_dtcwt
from saccade.papers.svt import ComplexMlp, RowMlp


def test_complex_mlp_is_complex():
    torch.manual_seed(0)
    mlp = ComplexMlp(3, 4).double()
    z = torch.randn(3, 5, 8, dtype=torch.float64)
    weights = [torch.complex(*weight) for weight in (mlp.weight1, mlp.weight2)]
    biases = [torch.complex(*bias)[:, None] for bias in (mlp.bias1, mlp.bias2)]
    hidden = torch.complex(z[..., :4], z[..., 4:]) @ weights[0] + biases[0]
    wanted = torch.complex(hidden.real.relu(), hidden.imag.relu()) @ weights[1] + biases[1]
    torch.testing.assert_close(mlp(z), torch.cat([wanted.real, wanted.imag], -1))


def test_without_an_mlp_it_smooths_and_with_weights_of_one_no_more():
    mixer = create_mixer("scattering", Site(8, grid=(6, 9))).double()
    with torch.no_grad():
        for parameter in mixer.channels.parameters():
            parameter.zero_()
        mixer.low.fill_(1)
        x = torch.randn(2, 7, 5, 8, dtype=torch.float64)  # another grid: ones stay ones
        low, high = dtcwt(x)
        torch.testing.assert_close(mixer(x), inverse_dtcwt(low, high * 0, (7, 5)), rtol=1e-5, atol=1e-5)


def test_rows_of_another_grid_keep_their_sums():
    rows = RowMlp((4, 6)).double()
    with torch.no_grad():
        rows.weight1.fill_(0.5)
    moved = rows.at(rows.weight1, (3, 9))
    assert moved.shape == (2, 3, 9, 9)
    torch.testing.assert_close(moved.sum(2), torch.full((2, 3, 9), 0.5 * 6, dtype=torch.float64))
    other = RowMlp((3, 9))
    assert all(other.resize(name, value).shape == getattr(other, name).shape for name, value in rows.named_parameters())


def test_only_the_first_stage_scatters():
    model = create_model("svt_nano")
    kinds = [[type(block.mixer).__name__ for block in stage.blocks] for stage in model.stages]
    assert kinds == [["Scattering"], ["Attention"] * 2, ["Attention"] * 2]


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="two sides"):
        create_mixer("scattering", Site(8, grid=(5,)))
    with pytest.raises(SaccadeError, match="3 groups do not divide 8"):
        create_mixer("scattering", Site(8), groups=3)
