import pytest
import torch

from saccade.ops.attend import aligned, attend


@pytest.mark.parametrize("widths", [(16, 13), (5, 8), (8, 8)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_may_be_narrower_or_wider_than_keys(widths, scale):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 9, widths[0], dtype=torch.float64)
    v, bias = torch.randn(2, 3, 9, widths[1], dtype=torch.float64), torch.randn(3, 9, 9, dtype=torch.float64)
    wanted = (q @ k.mT * (widths[0] ** -0.5 if scale is None else scale) + bias).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, bias, scale=scale), wanted)


def test_rows_off_sixteen_bytes_are_copied():
    x = torch.arange(2 * 5 * 33, dtype=torch.float32).view(2, 5, 33)
    strip = x[..., 1:]
    assert torch.equal(aligned(strip), strip) and aligned(strip).is_contiguous()
    whole = torch.randn(2, 5, 3, 4, 8)[:, :, 1].transpose(1, 2)
    assert aligned(whole) is whole


def test_a_single_head_has_steps_that_the_kernels_take():
    x = torch.nn.functional.pad(torch.randn(2, 9, 1).unflatten(-1, (1, 1)).transpose(1, 2), (0, 7))
    assert x.stride()[1] == 1  # of an axis of one: contiguous() leaves it
    assert aligned(x).stride() == (72, 72, 8, 1) and torch.equal(aligned(x), x)
