"""HAT: any picture, overlapping windows beside loops, the ways up."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_model
from saccade.papers.hat import OverlappingBlock, hat
from saccade.parts.restoration.body import reflected, upsampler
from tests.contracts.registered import randomised


def narrow(**options):
    torch.manual_seed(0)
    return randomised(hat(dim=8, depths=(2,), heads=(2,), window=4, compress=2, squeeze=4, **options)).eval()


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_any_size(scale):
    model = narrow(scale=scale)
    with torch.no_grad():
        for size in [(8, 12), (7, 9), (1, 5), (2, 1)]:
            image = torch.rand(2, 3, *size)
            out = model(image)
            assert out.shape == (2, 3, size[0] * scale, size[1] * scale) and out.isfinite().all()
            torch.testing.assert_close(torch.cat([model(one[None]) for one in image]), out)
        whole = torch.rand(1, 3, 8, 8)
        part = model(whole[..., :7])  # reflected to 8: the column of index 6 - 1 stands at index 7
        torch.testing.assert_close(model(torch.cat([whole[..., :7], whole[..., 5:6]], -1))[..., :7 * scale], part)


def test_reflection_goes_on_as_often_as_needed():
    line = torch.arange(3.0).view(1, 1, 1, 3)
    assert reflected(line, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert reflected(torch.ones(1, 1, 1, 1), 4).shape == (1, 1, 4, 4)
    assert reflected(line, 1) is line


def test_overlapping_windows_beside_loops():
    block = randomised(OverlappingBlock(Site(4, 2), window=2, overlap=1.0)).double()
    x = torch.randn(1, 4, 6, 4, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
    side, wanted = 2 + 4 - 1, torch.zeros_like(x)
    for row in range(4):
        for column in range(6):
            corner = (row // 2 * 2 - 1, column // 2 * 2 - 1)
            for head in range(2):
                part = slice(2 * head, 2 * head + 2)
                logits, values = [], []
                for i in range(4):
                    for j in range(4):
                        at = (corner[0] + i, corner[1] + j)
                        inside = 0 <= at[0] < 4 and 0 <= at[1] < 6
                        key = k[0, at[0], at[1], part] if inside else torch.zeros(2, dtype=torch.float64)
                        values.append(v[0, at[0], at[1], part] if inside else torch.zeros(2, dtype=torch.float64))
                        offset = (i - row % 2 + 2 - 4 + 1, j - column % 2 + 2 - 4 + 1)
                        bias = block.bias[(offset[0] * side + offset[1]) % side**2, head]
                        logits.append(q[0, row, column, part] @ key / 2**0.5 + bias)
                wanted[0, row, column, part] = torch.stack(logits).softmax(0) @ torch.stack(values)
    mixed = x + block.proj(wanted)
    torch.testing.assert_close(block(x), mixed + block.mlp(block.norm2(mixed)))


def test_bad_input():
    with pytest.raises(SaccadeError, match="scale=5"):
        upsampler(5, 8)
    with pytest.raises(SaccadeError, match=r"\(B, 3, H, W\)"):
        narrow(scale=2)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(SaccadeError, match="no option 'num_classes'"):
        create_model("hat_s_x2", num_classes=3)
    with pytest.raises(SaccadeError, match="no feature maps"):
        create_model("hat_s_x2", features_only=True)
