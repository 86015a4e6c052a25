"""DualToken-ViT without a golden of its own: the paper's arithmetic, a reference in loops, what its parts promise."""

from __future__ import annotations

import math

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model
from saccade.core.index import index
from saccade.papers.dualtoken_vit import BiDimensionalGate, DualToken
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


def built(grid=(14, 14), dim=16, heads=2, **options) -> DualToken:
    torch.manual_seed(0)
    return randomised(create_mixer("dual_token", Site(dim, heads, grid=grid), **options)).double().eval()


def counted(name, **options):
    with torch.device("meta"):
        model, image = create_model(name, **options), torch.empty(1, 3, 224, 224)
    return sum(parameter.numel() for parameter in model.parameters()), count_macs(model, (image,))


@pytest.mark.parametrize("name", ["dualtoken_vit_t", "dualtoken_vit_s"])
def test_published_multiply_adds(name):
    assert counted(name)[1] == pytest.approx(index()["papers"]["dualtoken_vit"]["macs"][name], rel=0.05)


def test_ablations_cost_what_the_paper_says():
    """Stepwise downsampling: 0.1 million parameters and 0.03 G; the usual MLP of G: a little more of both."""
    with torch.device("meta"):
        model = create_model("dualtoken_vit_s")
        parameters, macs = counted("dualtoken_vit_s")
        steps = [block.mixer.downsample for stage in model.stages for block in stage.blocks]
        assert [len(step) // 3 for step in steps] == [2] * 2 + [1] * 6 + [0] * 4
        assert round(sum(value.numel() for step in steps for value in step.parameters()) / 1e6, 1) == 0.1
        for step in steps:
            while len(step):
                del step[-1]
        assert round((macs - count_macs(model, (torch.empty(1, 3, 224, 224),))) / 1e9, 2) == 0.03
    usual = counted("dualtoken_vit_s", mlp="normal")
    assert 1 < usual[0] / parameters < 1.05 and 1 < usual[1] / macs < 1.05


def by_loops(mixer: DualToken, x: torch.Tensor) -> torch.Tensor:
    """One image (H, W, C), two steps of means by loops, attention a query at a time."""
    dim = x.shape[-1]
    local = x + mixer.local(x[None])[0]
    small = local
    for conv, linear, _ in zip(*[iter(mixer.downsample)] * 3):
        full = linear(conv(small[None]))[0]
        rows, columns = math.ceil(full.shape[0] / 2), math.ceil(full.shape[1] / 2)
        small = torch.stack([full[2 * i:2 * i + 2, 2 * j:2 * j + 2].mean((0, 1)) for i in range(rows)
                             for j in range(columns)]).view(rows, columns, dim)
    height, width, side = *small.shape[:2], mixer.size[0]
    cells = [small[i * height // side:-(-(i + 1) * height // side), j * width // side:-(-(j + 1) * width // side)]
             .mean((0, 1)) for i in range(side) for j in range(side)]
    summary = attention_by_loops(mixer.aggregate, torch.stack(cells), torch.stack(cells))
    alpha = 1 / (1 + math.exp(-float(mixer.alpha)))
    tokens = alpha * mixer.tokens[0] + (1 - alpha) * summary
    normed = mixer.norm(tokens)
    positions = normed.T @ mixer.mlp.mix.weight.T + mixer.mlp.mix.bias
    tokens = tokens + torch.nn.functional.gelu(positions).T @ mixer.mlp.fc.weight.T + mixer.mlp.fc.bias
    return local + attention_by_loops(mixer.broadcast, local.flatten(0, 1), tokens).view(x.shape)


def attention_by_loops(layer, x, context):
    rows = []
    width = x.shape[-1] // layer.heads
    k, v = layer.kv(context).chunk(2, -1)
    for query in layer.q(x):
        heads = []
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([query[part] @ key[part] for key in k]) / math.sqrt(width)
            heads.append(sum(weight * value[part] for weight, value in zip(scores.softmax(0), v)))
        rows.append(torch.cat(heads))
    return layer.proj(torch.stack(rows))


@pytest.mark.parametrize("grid", [(12, 12), (11, 13)])
def test_against_loops(grid):
    mixer, x = built(grid, side=3), torch.randn(1, *grid, 16, dtype=torch.float64)
    assert mixer.steps == (2 if grid == (12, 12) else 1)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], by_loops(mixer, x[0]))


def test_alpha_weighs_what_came_against_what_is_seen():
    mixer, x = built(), torch.randn(2, 14, 14, 16, dtype=torch.float64)
    carried, other = torch.randn(2, 2, 49, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.alpha.fill_(math.inf)  # alpha = 1: G' is of G alone
        first, second = mixer(x, carried)[1], mixer(x.flip(1), carried)[1]
        torch.testing.assert_close(first, second)
        mixer.alpha.fill_(-math.inf)  # alpha = 0: of the image alone
        torch.testing.assert_close(mixer(x, carried)[1], mixer(x, other)[1])
        assert not torch.allclose(mixer(x, carried)[1], mixer(x.flip(1), carried)[1])


def test_a_map_of_the_size_of_the_tokens_is_not_downsampled():
    mixer, x = built((7, 7)), torch.randn(1, 7, 7, 16, dtype=torch.float64)
    assert mixer.steps == 0 and not len(mixer.downsample)
    with torch.no_grad():
        tokens = x.flatten(1, 2)
        torch.testing.assert_close(mixer.summary(x), mixer.aggregate(tokens, tokens))


def test_the_broadcast_is_of_a_set_and_the_mixed_mlp_is_not():
    order = torch.randperm(49)
    x, tokens = (torch.randn(1, count, 16, dtype=torch.float64) for count in (20, 49))
    for kind in ("mix", "normal"):
        mixer = built(mlp=kind)
        with torch.no_grad():
            torch.testing.assert_close(mixer.broadcast(x, tokens[:, order]), mixer.broadcast(x, tokens))
            summary = tokens.flip(1)
            moved = mixer.enrich(tokens[:, order], summary[:, order])
            assert torch.allclose(moved, mixer.enrich(tokens, summary)[:, order]) == (kind == "normal")


def test_equal_global_tokens_tell_every_place_the_same():
    mixer, x = built(), torch.randn(1, 30, 16, dtype=torch.float64)
    with torch.no_grad():
        told = mixer.broadcast(x, torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 49, 16))
    torch.testing.assert_close(told, told[:, :1].expand_as(told))


def test_gates_only_weaken():
    gate = randomised(BiDimensionalGate(16)).double()
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64) * 4
    with torch.no_grad():
        out = gate(x)
    assert (out.abs() <= x.abs()).all() and (out.sign() == x.sign()).all()


def test_tokens_travel_from_stage_to_stage():
    model = create_model("dualtoken_vit_nano", num_classes=3).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(image)
        model.tokens.copy_(model.tokens.roll(1, 1) + 1)
        assert not torch.allclose(model(image), before)
    assert {"tokens", "stages.0.blocks.0.mixer.alpha"} <= model.no_weight_decay()
    alone = create_model("dualtoken_vit_nano", num_classes=3, mixer="dual_token").eval()  # each with tokens of its own
    wanted = alone(image)
    torch.nn.init.zeros_(alone.tokens)
    assert torch.equal(alone(image), wanted)


def test_an_unknown_mlp_is_one_line():
    with pytest.raises(SaccadeError, match='"mix" or "normal"'):
        create_model("dualtoken_vit_nano", mlp="usual")
