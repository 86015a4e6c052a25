"""S2AFormer has no golden: the paper's totals, a reference in loops, and what strips do and do not do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.core.index import index
from saccade.papers.s2aformer import HybridPerceptionBlock, StripAttention
from saccade.tools.measure import declared_macs
from tests.contracts.registered import randomised

CARD = index()["papers"]["s2aformer"]


def built(dim=12, heads=3, grid=(8, 8), **options) -> StripAttention:
    torch.manual_seed(0)
    site = Site(dim, heads, stride=16, grid=grid)
    return randomised(create_mixer("strip_attention", site, **options)).double().eval()


@pytest.mark.parametrize("name", CARD["params"])
def test_published_totals(name):
    """Our widths and depths were fitted to these: within 2 % of parameters and multiply-adds, at 256 pixels too."""
    larger = dict(zip(CARD["macs"], (0.56e9, 0.855e9, 1.03e9, 1.8e9, 5.38e9), strict=True))
    with torch.device("meta"):
        model = create_model(name)
        counts = [declared_macs(model, (torch.empty(1, 3, side, side),)) for side in (224, 256)]
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(CARD["params"][name], rel=0.02)
    assert counts == pytest.approx([CARD["macs"][name], larger[name]], rel=0.025)


@pytest.mark.parametrize(("grid", "reduction", "qk_dim"), [((4, 6), 2, 1), ((5, 7), 3, 2), ((3, 4), 1, 1)])
def test_against_loops(grid, reduction, qk_dim):
    mixer = built(grid=grid, reduction=reduction, qk_dim=qk_dim)
    x = torch.randn(*grid, 12, dtype=torch.float64)
    with torch.no_grad():
        cells = []
        for top in range(0, grid[0], reduction):
            for left in range(0, grid[1], reduction):
                if reduction == 1:
                    cells.append(x[top, left])
                    continue
                conv, norm = mixer.reduce
                total = conv.bias.clone()
                for i in range(reduction):
                    for j in range(reduction):
                        if top + i < grid[0] and left + j < grid[1]:
                            total += conv.weight[:, 0, i, j] * x[top + i, left + j]
                cells.append(norm(total))
        keys, values = mixer.kv(torch.stack(cells)).split((3 * qk_dim, 12), -1)
        rows = []
        for token in mixer.q(x).flatten(0, 1):
            heads = []
            for head in range(3):
                thin, wide = slice(head * qk_dim, (head + 1) * qk_dim), slice(4 * head, 4 * head + 4)
                scores = (keys[:, thin] * token[thin]).sum(-1) / math.sqrt(qk_dim)
                heads.append(scores.softmax(0) @ values[:, wide])
            rows.append(torch.cat(heads))
        wanted = mixer.proj(torch.stack(rows)).view(*grid, 12)
        torch.testing.assert_close(mixer(x[None])[0], wanted)


def test_without_its_compressions_it_is_multi_head_attention():
    mixer, x = built(reduction=1, qk_dim=4), torch.randn(2, 5, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        q = mixer.q(x)
        k, v = mixer.kv(x).chunk(2, -1)
        q, k, v = (part.reshape(2, 30, 3, 4).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(mixer(x), mixer.proj(out))


def test_a_strip_has_scores_of_rank_one_and_weights_that_sum_to_one():
    mixer, x = built(reduction=2), torch.randn(1, 8, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        host = torch.nn.Sequential(mixer)
        with record(host) as r:
            host(x)
    weights = r["0"].parts[0].weights
    assert weights.shape == (1, 3, 64, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    # log softmax is the scores but for a number a row, which a centred row has lost.
    scores = weights.log() - weights.log().mean(-1, keepdim=True)
    singular = torch.linalg.svdvals(scores)
    assert (singular[..., 1:] < 1e-10 * singular[..., :1]).all()
    with torch.no_grad():
        mixer.kv.weight[3:] = 0  # every value is the bias
        out = mixer(x)
    torch.testing.assert_close(out, mixer.proj(mixer.kv.bias[3:]).expand_as(out))


def test_keys_stay_as_many_when_side_and_reduction_double():
    for factor in (1, 2):
        site = Site(12, 3, grid=(8 * factor, 8 * factor))
        mixer = StripAttention(site, reduction=2 * factor)
        tokens, keys = 64 * factor**2, 16
        wanted = (tokens + keys) * 12 * 15 + tokens * 12 + tokens * keys * 15
        assert mixer.cost(site, site.grid) == wanted
        assert mixer.reduce(torch.randn(1, *site.grid, 12)).shape == (1, 4, 4, 12)
    assert [StripAttention(Site(12, 3, stride=stride)).reduction for stride in (4, 8, 16, 32)] == [8, 4, 2, 1]


def test_thin_queries_and_keys_learn():
    mixer, x = built(reduction=2), torch.randn(2, 8, 8, 12, dtype=torch.float64)
    (mixer(x) * torch.randn_like(x)).sum().backward()
    assert mixer.q.weight.grad.abs().max() > 1e-4 and mixer.kv.weight.grad[:3].abs().max() > 1e-4


def test_the_block_is_four_steps_and_only_its_convolutions_see_order():
    site = Site(12, 3, grid=(4, 4))
    block = randomised(HybridPerceptionBlock(site, StripAttention(site, reduction=1))).double().eval()
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    order = torch.randperm(16)

    def shuffled(x):
        return x.flatten(1, 2)[:, order].view_as(x)

    with torch.no_grad():
        step = x + block.local(x)
        step = step + block.mixer(block.norm1(step))
        step = step + block.interact(block.norm2(step))
        torch.testing.assert_close(block(x), step + block.mlp(block.norm3(step)))
        assert not torch.allclose(block(shuffled(x)), shuffled(block(x)))
        for layer in (block.local, block.interact[3]):
            layer.weight.zero_()
        torch.testing.assert_close(block(shuffled(x)), shuffled(block(x)))


def test_strides():
    model = create_model("s2aformer_mini", features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        for height, width in ((224, 224), (97, 65)):
            maps = model(torch.randn(1, 3, height, width))
            assert [value.shape[2:] for value in maps] == [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]


def test_heads_that_do_not_divide_are_one_line():
    with pytest.raises(SaccadeError, match="5 heads do not divide 12 channels"):
        create_mixer("strip_attention", Site(12, 5))
