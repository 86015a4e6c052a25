"""DRCT: dense groups beside their definition, any picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from saccade import Site
from saccade.papers.drct import DenseGroup, drct
from tests.contracts.registered import randomised


def test_blocks_read_all_that_was_made_before():
    group = randomised(DenseGroup(Site(8, 2), window=4, growth=4)).double().eval()
    x = torch.randn(1, 8, 12, 8, dtype=torch.float64)
    made = [x]
    for number in range(5):
        made.append(group.adjust[number](group.blocks[number](torch.cat(made, -1))))
        made[-1] = F.leaky_relu(made[-1], 0.2) if number < 4 else made[-1]
    torch.testing.assert_close(group(x), x + 0.2 * made[5])
    assert [block.mixer.shift for block in group.blocks] == [0, 2, 0, 2, 0]
    assert [block.site.dim for block in group.blocks] == [8, 12, 16, 20, 24]


def test_any_size():
    torch.manual_seed(0)
    model = randomised(drct(2, groups=1, dim=8, heads=2, window=4, growth=4)).eval()
    with torch.no_grad():
        for size in [(8, 12), (7, 9), (1, 5)]:
            image = torch.rand(2, 3, *size)
            out = model(image)
            assert out.shape == (2, 3, 2 * size[0], 2 * size[1]) and out.isfinite().all()
            torch.testing.assert_close(torch.cat([model(one[None]) for one in image]), out)
