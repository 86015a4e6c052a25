import torch

from saccade.ops.attend import aligned


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
