"""MAXIM: where its tokens reach, and what a gate is at the start."""

from __future__ import annotations

import torch
from torch import nn

from saccade import Site
from saccade.papers.maxim import BlockMix, CrossGating, GridMix, MultiAxisGmlp


def reached(mix: nn.Module) -> torch.Tensor:
    """The tokens of an 8 x 12 map that the one at (1, 2) changes."""
    x = torch.zeros(1, 8, 12, 1)
    other = x.clone()
    other[0, 1, 2] = 1
    return (mix(other) - mix(x))[0, ..., 0] != 0


def test_blocks_are_local_and_grids_dilated():
    local, dilated = torch.zeros(8, 12, dtype=torch.bool), torch.zeros(8, 12, dtype=torch.bool)
    local[:4, :3] = True  # the block of 4 x 3 that holds (1, 2)
    dilated[1::2, 2::4] = True  # cells of 2 x 4 tokens, a grid of 4 x 3 of them
    assert torch.equal(reached(BlockMix((4, 3))), local)
    assert torch.equal(reached(GridMix((4, 3))), dilated)


def test_padding_leaves_no_trace_on_whole_maps():
    """A map of whole blocks and cells is not touched by the padding of any other."""
    torch.manual_seed(0)
    mixer = MultiAxisGmlp(Site(8), (4, 4), (2, 2)).eval()
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        whole, cut = mixer(x), mixer(x[:, :7, :5])
    assert cut.shape == (1, 7, 5, 8) and whole.shape == x.shape
    zeros = x.clone()
    zeros[:, 7:], zeros[:, :, 5:] = 0, 0
    with torch.no_grad():
        torch.testing.assert_close(cut, mixer(zeros)[:, :7, :5])


def test_shut_gates_leave_both_maps():
    """With the gates' last layer at zero, y is its projection and x is its own with y added: x takes y, not y x."""
    torch.manual_seed(0)
    block = CrossGating(6, 5, 8, (4, 4), (4, 4), upsample=False).eval()
    for gate in (block.x_gate, block.y_gate):
        nn.init.zeros_(gate.fc2.weight)
        nn.init.zeros_(gate.fc2.bias)
    for layer in (block.x_out, block.y_out):
        nn.init.zeros_(layer.bias)
    x, y = torch.randn(1, 8, 8, 6), torch.randn(1, 8, 8, 5)
    with torch.no_grad():
        left, right = block(x, y)
        torch.testing.assert_close(right, block.y_in(y))
        torch.testing.assert_close(left, block.x_in(x) + block.y_in(y))
