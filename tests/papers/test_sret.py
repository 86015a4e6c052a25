"""Groups from their definition, shuffled or not; shared weights in SReT and, by `recursive`, in any Plain; messages."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.papers.sret import CARD, SIZES, recursive
from saccade.tools.measure import count_macs


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("grid, groups", [((4, 6), 4), ((5, 5), 4), ((3,), 8), ((2, 3, 3), 2)])
def test_tokens_meet_inside_their_group(grid, groups, shuffle):
    torch.manual_seed(0)
    mixer = create_mixer("sliced_group", Site(4, 2, grid=grid), groups=groups, shuffle=shuffle).double().eval()
    x = torch.randn(2, *grid, 4, dtype=torch.float64)
    count = x[0, ..., 0].numel()
    order = np.random.RandomState(count).permutation(count) if shuffle else np.arange(count)
    wanted = torch.zeros(2, count, 4, dtype=torch.float64)
    each = -(-count // min(groups, count))
    with torch.no_grad(), record(torch.nn.Sequential(mixer)) as r:
        out = mixer(x).flatten(1, -2)
        for start in range(0, count, each):
            members = order[start : start + each]
            q, k, v = mixer.qkv(x.flatten(1, -2)[:, members]).view(2, -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT / 2**0.5).softmax(-1)
            wanted[:, members] = (weights @ v).transpose(1, 2).reshape(2, -1, 4)
        torch.testing.assert_close(out, mixer.proj(wanted), rtol=1e-9, atol=1e-9)
        values = mixer.qkv(x.flatten(1, -2))[..., 8:].unflatten(-1, (2, 2)).transpose(1, 2)
        seen = (r["0"].dense(batch=2) @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-9)


def test_shuffled_anew_in_training_alone():
    mixer, x = create_mixer("sliced_group", Site(8, 2, index=1)), torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        assert not torch.equal(mixer(x), mixer(x))
        mixer.eval()
        assert torch.equal(mixer(x), mixer(x))
    assert not create_mixer("sliced_group", Site(8, 2, index=2)).shuffle
    assert not create_mixer("sliced_group", Site(8, 2, index=1), groups=1).shuffle


def test_pairs_of_blocks_share_all_but_what_follows():
    model = create_model("sret_nano")
    first, second = model.stages[1].blocks
    assert first.mixer.qkv.weight is second.mixer.qkv.weight and first.gain1 is second.gain1
    assert first.after.mlp.fc1.weight is not second.after.mlp.fc1.weight
    assert (first.mixer.groups, first.mixer.shuffle, second.mixer.groups) == (2, False, 1)
    twin = copy.deepcopy(model)
    assert twin.stages[1].blocks[0].mixer.qkv.weight is twin.stages[1].blocks[1].mixer.qkv.weight
    other = create_model("sret_nano", mixer="attention").stages[0].blocks
    assert other[0].mixer.qkv.weight is other[1].mixer.qkv.weight


def test_any_plain_becomes_recursive():
    torch.manual_seed(0)
    model, image = create_model("deit_nano").eval(), torch.randn(1, 3, 32, 32)
    before = sum(value.numel() for value in model.blocks.parameters())
    assert recursive(model, 3) is model
    assert 3 * sum(value.numel() for value in model.blocks.parameters()) == before
    with torch.no_grad():
        tokens, grid = model.tokens(image)
        for block in (model.blocks[0], model.blocks[3]):
            for _ in range(3):
                tokens = block(tokens, 1, grid)
        torch.testing.assert_close(model.forward_features(image), model.norm(tokens))
    model(image).sum().backward()
    assert model.blocks[2].mlp.fc1.weight.grad is model.blocks[0].mlp.fc1.weight.grad


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    """To the rounding of the table, which has one decimal."""
    side = SIZES[name].get("img_size", 224)
    with torch.device("meta"):
        model = create_model(name)
    assert count_macs(model, (torch.zeros(1, 3, side, side),)) == pytest.approx(CARD.macs[name], rel=0.05)


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="loops=4 does not divide a depth of 6"):
        recursive(create_model("deit_nano"), 4)
    with pytest.raises(SaccadeError, match="block 2 has other parameters"):
        recursive(create_model("spectformer_nano"), 4)
    with pytest.raises(SaccadeError, match="groups=0"):
        create_mixer("sliced_group", Site(8, 2), groups=0)
