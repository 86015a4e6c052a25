import pytest
import torch
import torch.nn.functional as F

from saccade.parts.convolution import CONVOLUTIONS, AveragePool, depthwise, grid_conv


@pytest.mark.parametrize("options", [{}, {"ceil_mode": True}, {"ceil_mode": True, "count_include_pad": False}])
def test_average_pool_is_torchs(options):
    x = torch.randn(2, 7, 6, 5)
    wanted = F.avg_pool2d(x.permute(0, 3, 1, 2).contiguous(), 3, 2, 1, **options).permute(0, 2, 3, 1)
    found = AveragePool(3, 2, 1, **options)(x)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()


@pytest.mark.parametrize("grid", [(1,), (11,), (7, 5), (1, 2), (6, 9), (4, 3, 5)])
@pytest.mark.parametrize(("kernel", "dilation", "bias"), [(3, 2, True), (7, 3, False), (3, 8, True)])
def test_dilated_depthwise_is_torchs(grid, kernel, dilation, bias):
    rank = len(grid)
    layer = depthwise(rank, 6, kernel, dilation, bias).double()
    x = torch.randn(2, *grid, 6, dtype=torch.float64, requires_grad=True)
    found = layer(x)
    wanted = CONVOLUTIONS[rank].forward(layer, x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()
    inputs, pull = (x, *layer.parameters()), torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(out, inputs, pull) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": (7, 9)}, {"padding_mode": "circular"},
                                     {"groups": 2}, {"padding": "same"}])
def test_other_dilated_convolutions_are_torchs(options):
    layer = grid_conv(2, 6, 6, 3, **{"dilation": 7, "padding": 7, "groups": 6, **options})
    x = torch.randn(2, 8, 9, 6)
    wanted = CONVOLUTIONS[2].forward(layer, x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(layer(x), wanted)
