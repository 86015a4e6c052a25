"""Halo attention against loops over queries, where a stride, a cut block and a halo meet; wide values in a network."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from saccade import SaccadeError, Site, create_model, record, swap
from saccade.papers.halonet import HaloAttention
from saccade.parts.resnet import Convolution
from tests.contracts.registered import randomised


def reference(mixer: HaloAttention, x: torch.Tensor) -> torch.Tensor:
    """One query at a time, keys by their place on the map; before pooling."""
    grid, rank = x.shape[1:-1], x.ndim - 2
    q = mixer.q(x).unflatten(-1, (mixer.heads, -1))
    k, v = mixer.kv(x).unflatten(-1, (mixer.heads, -1)).split([mixer.key_dim, mixer.value_dim], -1)
    offsets = mixer.offsets.chunk(rank)
    out = x.new_zeros(*x.shape[:1], *(-(-size // mixer.stride) for size in grid), mixer.heads, mixer.value_dim)
    for b, head, *i in product(range(len(x)), range(mixer.heads), *map(range, out.shape[1:-2])):
        token = [place * mixer.stride for place in i]
        starts = [place // mixer.block * mixer.block - mixer.halo for place in token]
        logits, values = [], []
        for step in product(range(mixer.window), repeat=rank):
            j = tuple(start + number for start, number in zip(starts, step))
            if any(place >= size + mixer.halo for place, size in zip(j, grid)):
                continue
            inside = all(0 <= place < size for place, size in zip(j, grid))
            logit = q[(b, *token, head)] @ k[(b, *j, head)] * mixer.key_dim**-0.5 if inside else x.new_zeros(())
            for axis, number in enumerate(step):
                at = number - i[axis] % (mixer.block // mixer.stride) + mixer.window - 1
                term = q[(b, *token, head)] @ offsets[axis][at]
                logit = logit + term * (mixer.key_dim**-0.5 if mixer.scaled else 1)
            logits.append(logit)
            values.append(v[(b, *j, head)] if inside else torch.zeros_like(v[(b, *([0] * rank), head)]))
        out[(b, *i, head)] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out.flatten(-2)


@pytest.mark.parametrize("grid, options", [
    ((6, 9), dict(stride=2)), ((5, 7), dict(stride=2, scaled=True, qkv_bias=True)), ((11,), dict(stride=2)),
    ((9,), dict(qkv_bias=True)), ((3, 5, 2), dict(scaled=True)), ((5, 4), dict(out_dim=12, key_dim=2)),
])
def test_against_loops(grid, options):
    torch.manual_seed(0)
    mixer = randomised(HaloAttention(Site(8, 2, grid=grid), block=4, halo=1, **options)).double()
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x))


@pytest.mark.parametrize("block", [4, 3])
def test_pooling_averages_what_is_there(block):
    """Of an odd side the last mean has one row; a block that the stride does not divide is pooled unasked."""
    torch.manual_seed(0)
    mixer = randomised(HaloAttention(Site(8, 2, grid=(5, 6)), block, 1, stride=2, pool=block == 4)).double()
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        full = reference(mixer, x)
        means = [[full[:, y:y + 2, x:x + 2].mean((1, 2)) for x in (0, 2, 4)] for y in (0, 2, 4)]
        torch.testing.assert_close(mixer(x), torch.stack([torch.stack(row, 1) for row in means], 1))


def test_recorded_queries_are_the_strided_tokens():
    model = nn.Sequential(HaloAttention(Site(8, 2, grid=(5, 6)), block=4, halo=1, stride=2))
    with torch.no_grad(), record(model) as r:
        model(torch.randn(2, 5, 6, 8))
    rows = r["0"].dense(batch=2).sum(-1)[0, 0]
    asked = [6 * y + x for y in (0, 2, 4) for x in (0, 2, 4)]
    assert rows[asked].min() > 0 and rows.count_nonzero() == len(asked)


def test_values_wider_than_keys():
    """Values of twice the width: another mixer is widened when the model is built, and refused by swap."""
    sizes = dict(values=2.0, num_classes=2)
    model = create_model("halonet_nano", **sizes)
    mixer = model.stages[2].blocks[1].mixer
    assert (mixer.q.out_features, mixer.value_dim * mixer.heads) == (32, 64)
    other = create_model("halonet_nano", mixer="halo_attention", **sizes)
    image = torch.randn(1, 3, 32, 24)
    assert model(image).shape == other(image).shape == (1, 2)
    with pytest.raises(SaccadeError):
        swap(model, "stages.2.blocks.1.mixer", "convolution")


def test_squeeze_and_excitation_stands_behind_convolutions_alone():
    model = create_model("halonet_nano")
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [isinstance(block.mixer, Convolution) for block in blocks] == [True, False, False, True, False]
    assert [isinstance(block.activation2, nn.Sequential) for block in blocks] == [True, False, False, True, False]


def test_a_stride_that_is_not_2():
    with pytest.raises(SaccadeError, match="stride=3"):
        HaloAttention(Site(8, 2), stride=3)
