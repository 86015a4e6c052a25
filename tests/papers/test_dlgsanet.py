"""DLGSANet: dynamic convolution beside a loop, tiles beside their definition, any picture."""

from __future__ import annotations

import pytest
import torch

from saccade.papers.dlgsanet import SIZES, DynamicConvolution, dlgsanet
from saccade.parts.restoration.transposed import TransposedAttention, starts
from tests.contracts.registered import randomised


def test_each_pixel_has_its_own_kernel():
    module = randomised(DynamicConvolution(4, kernel=3, shared=2)).double()
    x = torch.randn(1, 5, 6, 4, dtype=torch.float64)
    kernels = module.kernels(module.around(module.squeeze(x)))[0].unflatten(-1, (2, 3, 3))
    wanted = torch.zeros(5, 6, 4, dtype=torch.float64)
    for i, j, c in torch.cartesian_prod(torch.arange(5), torch.arange(6), torch.arange(4)).tolist():
        for di, dj in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            if 0 <= i + di - 1 < 5 and 0 <= j + dj - 1 < 6:
                wanted[i, j, c] += kernels[i, j, c // 2, di, dj] * x[0, i + di - 1, j + dj - 1, c]
    torch.testing.assert_close(module(x)[0], wanted)


SIDES = [(13, 8, [0, 5]), (18, 8, [0, 5, 10]), (8, 8, [0]), (5, 8, [0]), (17, 8, [0, 5, 9])]


@pytest.mark.parametrize("side, tile, wanted", SIDES)
def test_tiles_cover_a_side(side, tile, wanted):
    assert starts(side, tile) == wanted


def test_tiles_are_met_by_batches_and_left_in_training():
    module = randomised(TransposedAttention(8, 2, f=torch.relu, tile=4)).double().eval()
    x = torch.randn(3, 6, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([module(one[None]) for one in x]), module(x))
    whole = TransposedAttention(8, 2, f=torch.relu).double()
    whole.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.train()(x), whole(x))
    assert not torch.allclose(module.eval()(x), whole(x))


def test_any_size_and_its_parameters():
    torch.manual_seed(0)
    model = randomised(dlgsanet(3, dim=16, groups=1, depth=1, shared=4, heads=2, tile=5)).eval()
    with torch.no_grad():
        for size in [(8, 12), (7, 9), (1, 5)]:
            assert model(torch.rand(2, 3, *size)).shape == (2, 3, 3 * size[0], 3 * size[1])
    with torch.device("meta"):
        for name, million in (("_tiny", 0.581), ("_light", 0.761), ("", 4.76)):
            count = sum(weight.numel() for weight in dlgsanet(**SIZES[f"dlgsanet{name}_x4"]).parameters())
            assert count / 1e6 == pytest.approx(million, rel=2e-3)
