"""What FcaFormer's goldens leave open: which cross tokens a block is given, other grids, other mixers."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import SaccadeError, Site, create_model, record
from saccade.papers.fcaformer import CrossAttention, CrossBlock
from tests.contracts.registered import randomised


def test_against_loops():
    """On the native grid: bias by |offset|, cross tokens scaled, normed, biased, and seen by every query."""
    torch.manual_seed(0)
    mixer = randomised(CrossAttention(Site(8, 2, grid=(3, 5)), sources=2)).double()
    x, cross = torch.randn(1, 3, 5, 8).double(), torch.randn(1, 4, 8).double()
    places = list(product(range(3), range(5)))
    with torch.no_grad():
        keys = torch.cat([x.flatten(1, 2), mixer.cross_norm(cross * mixer.scale[..., None])], 1)[0]
        q, k, v = mixer.qkv(keys).unflatten(-1, (3, 2, 4)).unbind(1)
        out = torch.zeros(15, 2, 4, dtype=torch.float64)
        for i, head in product(range(15), range(2)):
            logits = (k[:, head] @ q[i, head]) / 2
            for j, place in enumerate(places):
                apart = [abs(here - there) for here, there in zip(places[i], place)]
                logits[j] += mixer.bias[head, 5 * apart[0] + apart[1]]
            logits[15:] += mixer.cross_bias[head]
            out[i, head] = logits.softmax(0) @ v[:, head]
        torch.testing.assert_close(mixer(x, cross)[0].flatten(0, 1), mixer.proj(out.flatten(1)))


def test_blocks_are_given_the_last_cross_tokens():
    model = create_model("fcaformer_nano", depths=(1, 4, 1), keep=2).eval()
    given = []
    for block in model.stages[1].blocks:
        block.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    left = []
    for block in model.stages[1].blocks:
        block.register_forward_hook(lambda module, inputs, output: left.append(output[1]))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 40))  # 16 x 10 tokens, 4 x 3 cells
    assert given[0] is None and left[3] is None
    assert torch.equal(given[1], left[0]) and given[1].shape == (2, 12, 64)
    assert torch.equal(given[3], torch.cat(left[1:3], 1))
    assert [block.mixer.sources for block in model.stages[1].blocks] == [0, 1, 2, 2]


def test_what_is_learned_is_stretched_to_another_grid():
    """Distance 0 and the farthest keep their bias; every source keeps its own factors."""
    mixer = randomised(CrossAttention(Site(8, 2, grid=(8, 8)), sources=2))
    bias = mixer.offsets((15, 15))  # two heads, offsets -14 to 14 an axis
    assert torch.equal(bias, bias.flip(1)) and torch.equal(bias, bias.flip(2))
    torch.testing.assert_close(bias[:, 14, 14], mixer.bias[:, 0])
    torch.testing.assert_close(bias[:, 28, 28], mixer.bias[:, -1])
    torch.testing.assert_close(bias[:, 14, 28], mixer.bias[:, 7])
    torch.testing.assert_close(bias[:, 14, 16], mixer.bias[:, 1])
    larger = CrossAttention(Site(8, 2, grid=(16, 16)), sources=2)
    for name in ("bias", "scale", "cross_bias"):
        assert larger.resize(name, getattr(mixer, name)).shape == getattr(larger, name).shape
    constant = torch.tensor([[1.0] * 4 + [2.0] * 4])
    assert torch.equal(larger.resize("scale", constant), torch.tensor([[1.0] * 16 + [2.0] * 16]))


def test_recorded_cross_tokens_lie_in_the_middle_of_what_they_merge():
    torch.manual_seed(0)
    site = Site(8, 2, index=1, grid=(5, 6))
    block = CrossBlock(site, randomised(CrossAttention(site, 1)), merges=True).eval()
    with torch.no_grad(), record(block) as r:
        block(torch.randn(1, 5, 6, 8), torch.randn(1, 4, 8))
    part = r["mixer"].parts[0]
    assert part.key[0, 30:].tolist() == [0, 4, 24, 28]
    torch.testing.assert_close(r["mixer"].dense().sum(-1), torch.ones(1, 2, 30))


@pytest.mark.parametrize("mixer", ["attention", "forward_cross_attention"])
def test_another_mixer_knows_no_cross_tokens(mixer):
    model = create_model("fcaformer_nano", mixer=mixer, num_classes=2).eval()
    assert model(torch.randn(1, 3, 40, 24)).shape == (1, 2)


def test_cross_tokens_that_nothing_calibrates():
    with pytest.raises(SaccadeError, match="sources=0"):
        CrossAttention(Site(8, 2))(torch.randn(1, 4, 4, 8), torch.randn(1, 1, 8))
