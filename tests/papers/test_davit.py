"""DaViT against slow references, its card and timm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.core.keymap import rename
from saccade.core.load import load
from saccade.papers.davit import AUTHORS, CARD, SIZES, TIMM, ChannelGroup, Downsample, DualBlock, Window, davit

GRIDS = [(7, 7), (1, 13), (5, 11), (4, 6), (9,), (3, 2, 5)]


def spread(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


@pytest.mark.parametrize("grid", GRIDS)
def test_channel_attention_is_what_its_formula_says(grid):
    """Element by element: weight[i, j] of channels i and j in a group, out[n, i] = sum_j weight[i, j] q[n, j]."""
    dim, heads = 6, 2
    module = spread(ChannelGroup(Site(dim, heads, grid=grid)))
    x = torch.randn(2, *grid, dim, dtype=torch.float64)
    with torch.no_grad():
        found = module(x)
        q, k, v = module.qkv(x.flatten(1, -2)).chunk(3, -1)
        out, size = torch.zeros_like(q), dim // heads
        for image in range(2):
            for first in range(0, dim, size):
                for i in range(first, first + size):
                    logits = [sum(k[image, n, i] * v[image, n, j] for n in range(q.shape[1])) / size**0.5
                              for j in range(first, first + size)]
                    weight = torch.stack(logits).softmax(0)
                    for j in range(size):
                        out[image, :, i] += weight[j] * q[image, :, first + j]
        torch.testing.assert_close(found, module.proj(out).view(x.shape), rtol=1e-10, atol=1e-10)


def test_channel_attention_does_not_know_where_tokens_stand():
    module = spread(ChannelGroup(Site(8, 2, grid=(12,))))
    x, order = torch.randn(1, 12, 8, dtype=torch.float64), torch.randperm(12)
    with torch.no_grad():
        torch.testing.assert_close(module(x)[:, order], module(x[:, order]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", [(7, 5), (1, 4), (6, 6)])
def test_windows_see_zeros_beyond_the_border(grid):
    """Tokens of padding are zeros before qkv: its bias makes keys and values of them, which nothing masks."""
    side = 3
    module = spread(Window(Site(4, 1, grid=grid), window=side))
    x = torch.randn(1, *grid, 4, dtype=torch.float64)
    with torch.no_grad():
        found = module(x)
        for row in range(grid[0]):
            for column in range(grid[1]):
                top, left = row // side * side, column // side * side
                window = [x[0, i, j] if i < grid[0] and j < grid[1] else torch.zeros(4, dtype=torch.float64)
                          for i in range(top, top + side) for j in range(left, left + side)]
                q, k, v = module.qkv(torch.stack(window)).chunk(3, -1)
                place = (row - top) * side + column - left
                weight = (k @ q[place] / 2).softmax(0)
                torch.testing.assert_close(found[0, row, column], module.proj(weight @ v), rtol=1e-10, atol=1e-10)


def test_block_is_two_convolutions_attention_and_mlp():
    site = Site(8, 2, grid=(5, 6))
    block = spread(DualBlock(site, Window(site, 3), norm=nn.LayerNorm))
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        one = x + nn.functional.conv2d(x.movedim(-1, 1), block.position1.weight, block.position1.bias, padding=1,
                                       groups=8).movedim(1, -1)
        two = one + block.mixer(block.norm1(one))
        three = two + block.position2(two)
        torch.testing.assert_close(block(x), three + block.mlp(block.norm2(three)))


@pytest.mark.parametrize("overlapped", [False, True])
def test_odd_sides_are_padded_before_they_are_halved(overlapped):
    module = spread(Downsample(2, 3, 4, overlapped))
    x = torch.randn(1, 5, 7, 3, dtype=torch.float64)
    padded = nn.functional.pad(module[0](x), (0, 0, 0, 1, 0, 1)).movedim(-1, 1)
    wanted = nn.functional.conv2d(padded, module[1].weight, module[1].bias, stride=2, padding=int(overlapped))
    torch.testing.assert_close(module(x), wanted.movedim(1, -1))
    assert module(x).shape == (1, 3, 4, 4)


def test_spatial_and_channel_blocks_take_turns():
    model = create_model("davit_nano")
    kinds = [type(block.mixer) for stage in model.stages for block in stage.blocks]
    assert kinds == [Window, ChannelGroup] * 3
    alone = davit(**SIZES["davit_nano"] | dict(order=("channel",)))
    assert [type(block.mixer) for stage in alone.stages for block in stage.blocks] == [ChannelGroup] * 3
    with pytest.raises(SaccadeError, match="spatial"):
        create_model("davit_nano", order=("temporal",))


@pytest.mark.parametrize("name", CARD.params)
def test_parameters_are_the_papers(name):
    with torch.device("meta"):
        model = davit(**SIZES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(CARD.params[name], rel=0.005)


def test_channel_weights_are_recorded_without_a_place():
    module = nn.Sequential(create_mixer("channel_group", Site(12, 3, grid=(4, 5))))
    with record(module) as r, torch.no_grad():
        module(torch.randn(2, 4, 5, 12))
    assert not r["0"].placed
    (part,) = r["0"].parts
    assert part.weights.shape == (2, 3, 4, 4)
    torch.testing.assert_close(part.weights.sum(-1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (33, 18)])
def test_timm_agrees(size):
    timm = pytest.importorskip("timm.models.davit")
    torch.manual_seed(0)
    theirs = timm.DaVit(depths=(1, 2), embed_dims=(16, 32), num_heads=(2, 4), window_size=3, num_classes=7).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = davit((16, 32), (1, 2), (2, 4), window=3, num_classes=7).eval()
    ours.load_state_dict(rename(theirs.state_dict(), TIMM).state)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)
        for mine, wanted in zip(ours.features(image), theirs.forward_intermediates(image)[1], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))


def test_both_layouts_are_recognised():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        names = timm.create_model("davit_tiny").state_dict()
    model = create_model("davit_tiny")
    state = {name: torch.zeros(value.shape) for name, value in names.items()}
    report = load(model, state)
    assert report.format == "timm" and report.loaded == report.of and not report.left
    ours = set(model.state_dict())
    assert set(rename(names, TIMM).state) == ours and not ours & set(rename(names, AUTHORS).state) == ours
