"""What goldens and contracts do not say of TiC."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model
from saccade.papers.tic import MsaConv, ShiftedMsaConv


def layer(dim: int = 4, rank: int = 2, **options) -> MsaConv:
    torch.manual_seed(0)
    return MsaConv(rank, dim, dim, **options).double().eval()


@pytest.mark.parametrize("options", [dict(), dict(dilation=2), dict(pooled=True), dict(masked=True, pooled=True),
                                     dict(shifts=((0, 2), (-1, 0))), dict(shifts=((1, 1), (-1, 1)), pooled=True)])
def test_attention_against_loops(options):
    grid = (4, 5)
    module = layer(**options)
    x = torch.randn(1, *grid, 4, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (module.heads, -1)) for part in module.qkv(x)[0].detach().chunk(3, -1))
    wanted = torch.zeros(*grid, module.heads, 4 // module.heads, dtype=torch.float64)
    step, offsets = options.get("dilation", 1), list(product((-1, 0, 1), repeat=2))
    for row, column, head in product(range(4), range(5), range(module.heads)):
        down, right = options.get("shifts", ((0, 0),))[head]

        def at(one, i, j, head=head, down=down, right=right):
            return one[(i - down) % 4, (j - right) % 5, head]

        def cell(one, i, j):
            inside = [at(one, a, b) for a in (i // 2 * 2, i // 2 * 2 + 1) for b in (j // 2 * 2, j // 2 * 2 + 1)
                      if a < 4 and b < 5]
            return torch.stack(inside).mean(0)

        seen = [(at, row + step * i, column + step * j) for i, j in offsets]
        if options.get("pooled"):
            seen += [(cell, row + 2 * step * i, column + 2 * step * j) for i, j in offsets]
        logits, values = [], []
        for read, i, j in seen:
            if 0 <= i < 4 and 0 <= j < 5:
                logits.append(q[row, column, head] @ read(k, i, j) * q.shape[-1] ** -0.5)
                values.append(read(v, i, j))
            elif not options.get("masked"):
                logits.append(torch.zeros((), dtype=torch.float64))
                values.append(torch.zeros_like(v[0, 0, 0]))
        wanted[row, column, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(module.attend(x)[0].detach(), wanted.flatten(-2))


@pytest.mark.parametrize("grid", [(6,), (3, 4), (2, 3, 2)])
def test_a_window_over_everything_is_global_attention_where_padding_is_masked(grid):
    kernel = 2 * max(grid) - 1
    x = torch.randn(2, *grid, 4, dtype=torch.float64)
    found = {}
    for masked in (True, False):
        module = layer(rank=len(grid), kernel=kernel, masked=masked)
        found[masked] = module.attend(x).flatten(1, -2)
        q, k, v = module.qkv(x.flatten(1, -2)).chunk(3, -1)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found[True], wanted)
    assert (found[False] - wanted).abs().max() > 0.01  # positions outside take their share


def test_positions_outside_take_their_share():
    module = layer()
    with torch.no_grad():
        module.qkv.weight.zero_()
        module.qkv.bias.copy_(torch.tensor([0.0] * 8 + [1.0] * 4))  # no query, no key, every value 1
    share = module.attend(torch.randn(1, 3, 3, 4, dtype=torch.float64))[0, :, :, 0].detach()
    wanted = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]], dtype=torch.float64) / 9
    torch.testing.assert_close(share, wanted)


def test_a_shift_moves_what_a_head_sees():
    """Support of the gradient of the middle: the window, with holes where dilated, moved by a head's steps."""
    def support(**options):
        module = layer(**options)
        x = torch.randn(1, 11, 11, 4, dtype=torch.float64, requires_grad=True)
        width = 4 // module.heads
        return [set(map(tuple, (torch.autograd.grad(module.attend(x)[0, 5, 5, head * width:(head + 1) * width].sum(), x)
                                [0][0].abs().amax(-1) > 1e-12).nonzero().tolist())) for head in range(module.heads)]

    window = {(5 + i, 5 + j) for i, j in product((-1, 0, 1), repeat=2)}
    assert support() == support(shifts=((0, 0),)) == [window]
    assert support(dilation=2) == [{(5 + 2 * i, 5 + 2 * j) for i, j in product((-1, 0, 1), repeat=2)}]
    assert support(shifts=((3, 0), (0, -7))) == [
        {(5, 5)} | {(row - 3, column) for row, column in window},
        {(5, 5)} | {(row, (column + 7) % 11) for row, column in window}]


def test_interior_moves_with_the_picture():
    module = ShiftedMsaConv(Site(8, 1, grid=(12, 12)), kernel=3).double()
    x = torch.randn(1, 12, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        out, moved = module(x), module(x.roll((1, 2), (1, 2)))
    torch.testing.assert_close(moved[:, 4:10, 5:10], out[:, 3:9, 3:8])


def test_heads_take_the_directions_in_turn():
    model = create_model("tic", num_classes=0)
    blocks = model.stages[2].blocks
    assert blocks[0].mixer.shifts == [(0, 0)] * 10
    assert [block.mixer.shift for block in blocks] == [0, 3, 6, 9, 12, 15]
    assert len(set(blocks[1].mixer.shifts)) == 9 and blocks[1].mixer.shifts[0] == (0, 3)
    assert [block.mixer.pool is not None for block in blocks] == [False, True] * 3


def test_bad_input_is_one_line():
    with pytest.raises(SaccadeError, match="kernel=4"):
        create_mixer("msa_conv", Site(32, 1), kernel=4)
    with pytest.raises(SaccadeError, match="3 heads do not divide 32"):
        create_mixer("msa_conv", Site(32, 3))
