"""What state space mixers share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.parts.ssm import CausalConv


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_a_causal_convolution_sees_what_came_before(length: int, kernel: int, bias: bool) -> None:
    """With gradients (a convolution) and without (a pass for each tap), against one padded in front."""
    conv = CausalConv(5, kernel, bias).double()
    x = torch.randn(2, length, 10, dtype=torch.float64)[..., :5]
    wanted = F.conv1d(F.pad(x.mT, (kernel - 1, 0)), conv.weight, conv.bias, groups=5).mT
    torch.testing.assert_close(conv(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), wanted)
