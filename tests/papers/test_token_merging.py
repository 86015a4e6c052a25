"""ToMe beside its definition, written out."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, apply, create_model
from saccade.papers.token_merging import MergingBlock
from saccade.parts.host import Kept
from tests.contracts.registered import randomised


def by_loops(tokens, keys, sizes, pairs, prefix):
    """One picture: tokens (N, C), keys (N, d), sizes (N,) -> what stays, in its order."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    evens, odds = range(prefix, len(tokens), 2), range(prefix + 1, len(tokens), 2)
    edges = []
    for one in evens:
        other = max(odds, key=lambda odd: float(keys[one] @ keys[odd]))
        edges.append((-float(keys[one] @ keys[other]), one, other))
    chosen = sorted(edges)[:pairs]
    total, count = tokens * sizes[:, None], sizes.clone()
    for _, one, other in chosen:
        total[other] += tokens[one] * sizes[one]
        count[other] += sizes[one]
    stay = [token for token in range(len(tokens)) if token not in {one for _, one, _ in chosen}]
    return (total / count[:, None])[stay], count[stay]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_merging_is_its_definition(prefix):
    model = create_model("deit_nano").double()
    block = MergingBlock(5, block=model.blocks[0], prefix=prefix, kept=Kept(), first=True)
    tokens, keys = torch.randn(2, 21, 64, dtype=torch.float64), torch.randn(2, 21, 8, dtype=torch.float64)
    block.start(tokens)
    sizes = torch.randint(1, 5, (2, 21)).double()
    block.kept.sizes = sizes
    merged = block.merge(tokens, keys, 5)
    for image in range(2):
        wanted, count = by_loops(tokens[image], keys[image], sizes[image], 5, prefix)
        torch.testing.assert_close(merged[image], wanted)
        torch.testing.assert_close(block.kept.sizes[image], count)
    assert torch.equal(block.kept.sizes.sum(1), sizes.sum(1))


def test_equal_tokens_merge_without_a_trace():
    """A picture of equal patches at equal places: proportional attention gives the host's output whatever r is."""
    model = randomised(create_model("deit_nano", num_classes=5)).double().eval()
    with torch.no_grad():
        model.position[:, 1:] = model.position[:, 1:2]
        image = torch.randn(1, 3, 4, 4, dtype=torch.float64).repeat(1, 1, 8, 8)
        before = model(image)
        apply(model, "token_merging", r=9)
        torch.testing.assert_close(model(image), before)
    assert model.blocks[5].kept.sizes.shape[1] == 65 - 6 * 9 and model.blocks[5].kept.sizes.sum() == 65


def test_no_more_than_half_of_the_tokens_go():
    model = create_model("deit_nano").eval()
    apply(model, "token_merging", r=1000)
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[1] == 1 + 1
    with pytest.raises(SaccadeError, match="r=-1"):
        apply(create_model("deit_nano"), "token_merging", r=-1)
