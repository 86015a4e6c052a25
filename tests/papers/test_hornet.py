"""What goldens of HorNet do not show: the feature pyramid."""

from __future__ import annotations

import torch

from saccade.papers.hornet import HorFPN


def test_hor_fpn_keeps_grids_and_is_a_plain_fpn_where_the_gates_are_zero():
    torch.manual_seed(0)
    fpn = HorFPN((8, 12, 16), out_dim=16, order=3).double().eval()
    maps = [torch.randn(2, dim, *grid, dtype=torch.float64) for dim, grid in ((8, (9, 14)), (12, (5, 7)), (16, (3, 4)))]
    outs = fpn(maps)
    assert [tuple(out.shape) for out in outs] == [(2, 16, 9, 14), (2, 16, 5, 7), (2, 16, 3, 4)]
    for smooth in fpn.smooth:
        torch.nn.init.zeros_(smooth.proj.weight)
        torch.nn.init.zeros_(smooth.proj.bias)
    top = fpn.lateral[2](maps[2].movedim(1, -1))
    torch.testing.assert_close(fpn(maps)[2], top.movedim(-1, 1))
    near = fpn(maps)[1][0, :, 4, 6] - fpn.lateral[1](maps[1].movedim(1, -1))[0, 4, 6]
    torch.testing.assert_close(near, top[0, 2, 3])  # nearest: row 4 of 5 lies on row 2 of 3, column 6 of 7 on 3 of 4
