"""MAXIM: where its tokens reach, and what a gate is at the start."""

from __future__ import annotations

import torch
from torch import nn

from saccade import Site
from saccade.papers.maxim import CrossGating, MultiAxisGmlp, maxim, reflected
from saccade.parts.multi_axis import BlockMix, GridMix


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


def test_reflection_goes_on_as_long_as_needed():
    image = torch.arange(3.0).expand(1, 1, 4, 3)
    assert reflected(image, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert reflected(image[..., :1], 4)[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert reflected(image, 1) is image


def test_every_stage_gives_every_scale():
    torch.manual_seed(0)
    model = maxim(8, 2).eval()
    image = torch.rand(1, 3, 37, 70)
    with torch.no_grad():
        stages, out = model.stages(image), model(image)
    assert [[tuple(picture.shape[2:]) for picture in stage] for stage in stages] == [[(10, 18), (19, 35), (37, 70)]] * 2
    assert torch.equal(out, stages[-1][-1])


def test_a_network_that_adds_nothing_gives_the_picture_back():
    """With the last convolutions at zero what remains are the pictures, subsampled at the middle of each square."""
    model = maxim(8, 1).eval()
    for layer in model.unets[-1].outputs:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        coarse, half, full = model.stages(image)[-1]
    assert torch.equal(full, image)
    assert torch.equal(half, image[:, :, 1::2, 1::2]) and torch.equal(coarse, image[:, :, 2::4, 2::4])
