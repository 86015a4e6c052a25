import pytest
import torch
import torch.nn.functional as F

from saccade.parts.convolution import AveragePool


@pytest.mark.parametrize("options", [{}, {"ceil_mode": True}, {"ceil_mode": True, "count_include_pad": False}])
def test_average_pool_is_torchs(options):
    x = torch.randn(2, 7, 6, 5)
    wanted = F.avg_pool2d(x.permute(0, 3, 1, 2).contiguous(), 3, 2, 1, **options).permute(0, 2, 3, 1)
    found = AveragePool(3, 2, 1, **options)(x)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()
