"""ConViT against slow references, its start as a convolution, and timm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.core.load import load
from saccade.papers.convit import CARD, SIZES, GatedPositional, convit, locality
from saccade.parts.attention import Attention

GRIDS = [(3, 5), (1, 7), (4, 4), (6,), (2, 3, 4)]


def spread(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def places(grid):
    return [index for index in torch.cartesian_prod(*[torch.arange(side) for side in grid]).view(-1, len(grid))]


@pytest.mark.parametrize("grid", GRIDS)
def test_gated_attention_is_what_its_formula_says(grid):
    """Query by query: the mixture of two softmaxes, columns of the position logits from the last axis to the first."""
    dim, heads = 6, 2
    module = spread(GatedPositional(Site(dim, heads, grid=grid)))
    x = torch.randn(2, *grid, dim, dtype=torch.float64)
    size, points = dim // heads, places(grid)
    with torch.no_grad():
        q, k, v = module.qkv(x.flatten(1, -2)).chunk(3, -1)
        out = torch.zeros_like(q)
        for head in range(heads):
            part, gate = slice(head * size, (head + 1) * size), torch.sigmoid(module.gate[head])
            for i, here in enumerate(points):
                features = [[*(there - here).flip(0), ((there - here) ** 2).sum()] for there in points]
                logits = torch.tensor(features, dtype=torch.float64) @ module.position.weight[head]
                position = (logits + module.position.bias[head]).softmax(0)
                for image in range(2):
                    content = (k[image, :, part] @ q[image, i, part] / size**0.5).softmax(0)
                    out[image, i, part] = ((1 - gate) * content + gate * position) @ v[image, :, part]
        torch.testing.assert_close(module(x), module.proj(out).view(x.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
def test_position_map_is_the_product_of_its_factors(grid):
    position = spread(GatedPositional(Site(12, 3, grid=grid))).position
    product = torch.ones(3, 1, 1, dtype=torch.float64)
    for factor in position.factors(grid):
        product = torch.stack([torch.kron(one, two) for one, two in zip(product, factor, strict=True)])
    torch.testing.assert_close(position(grid), product, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("heads", "side", "rank"), [(4, 2, 2), (9, 3, 2), (16, 4, 2), (3, 3, 1), (27, 3, 3)])
def test_heads_start_at_the_places_of_a_neighbourhood(heads, side, rank):
    """Logits are -s |offset - centre|^2 up to a constant; the centres are the k^rank places, first axis fastest."""
    strength = 0.7
    module = GatedPositional(Site(heads, heads, grid=(5,) * rank), strength)
    centres = [[head // side**axis % side - (side - 1) / 2 for axis in range(rank)] for head in range(heads)]
    assert len({tuple(centre) for centre in centres}) == heads
    points = torch.stack(places((5,) * rank)).double()
    wanted = [[-strength * ((key - query - torch.tensor(centre)) ** 2).sum(-1) for query in points]
              for key in [points] for centre in centres]
    maps = torch.stack([torch.stack(one) for one in wanted]).softmax(-1)
    torch.testing.assert_close(module.position((5,) * rank).double(), maps, rtol=1e-4, atol=1e-6)
    assert torch.equal(module.qkv.weight[2 * heads:], torch.eye(heads)) and torch.equal(module.gate, torch.ones(heads))


def test_odd_neighbourhood_with_hard_gates_is_a_convolution():
    """Nine heads, gates shut on position, a sharp focus: out[y, x] = sum of W_D x[y + Dy, x + Dx], inside."""
    torch.manual_seed(0)
    module = GatedPositional(Site(18, 9, grid=(6, 7)), strength=40.0).double()
    nn.init.constant_(module.gate, 40.0)
    x = torch.randn(1, 6, 7, 18, dtype=torch.float64)
    kernel = torch.zeros(18, 18, 3, 3, dtype=torch.float64)
    for head in range(9):
        kernel[:, 2 * head:2 * head + 2, head % 3, head // 3] = module.proj.weight[:, 2 * head:2 * head + 2]
    wanted = nn.functional.conv2d(x.movedim(-1, 1), kernel, module.proj.bias)
    torch.testing.assert_close(module(x)[:, 1:-1, 1:-1], wanted.movedim(1, -1), rtol=1e-8, atol=1e-8)


def test_model_starts_local_and_strength_sharpens():
    for block in create_model("convit_nano").blocks[:4]:
        assert torch.equal(block.mixer.qkv.weight[128:], torch.eye(64)) and block.mixer.position.weight[0, 2] == -1
    assert create_model("convit_nano", strength=3.0).blocks[0].mixer.position.weight[0, 2] == -3


def test_class_token_joins_after_the_gated_blocks():
    model = spread(create_model("convit_nano"))
    assert [type(block.mixer) for block in model.blocks] == [GatedPositional] * 4 + [Attention] * 2
    image = torch.randn(2, 3, 28, 36, dtype=torch.float64)
    with torch.no_grad():
        before = [value.clone() for value in model.features(image)]
        model.class_token.add_(1)
        after = model.features(image)
        assert model.forward_features(image).shape == (2, 1 + 63, 64)
    assert all(torch.equal(one, two) for one, two in zip(before[:4], after[:4], strict=True))
    assert not torch.equal(before[5], after[5]) and all(value.shape == (2, 64, 7, 9) for value in after)


def test_pooling_and_other_mixers():
    image = torch.randn(1, 3, 32, 32)
    averaged = create_model("convit_nano", global_pool="avg", num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(averaged(image), averaged.forward_features(image)[:, 1:].mean(1))
    with pytest.raises(SaccadeError, match="global_pool"):
        create_model("convit_nano", global_pool="median")
    with pytest.raises(SaccadeError, match="prefix_mode"):
        create_model("convit_nano", mixer="pooling")
    assert create_model("convit_nano", mixer="pooling", prefix_mode="mean")(image).shape == (1, 1000)
    assert {"class_token", "position"} <= create_model("convit_nano").no_weight_decay()


def test_another_grid_resamples_the_positions():
    small = create_model("convit_nano")
    large = create_model("convit_nano", img_size=(40, 48))
    report = load(large, small.state_dict())
    assert report.resized == ["position"] and large.position.shape == (1, 120, 64)
    image = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(image), large.eval()(image), rtol=1e-4, atol=1e-5)


def test_locality_of_known_maps():
    """A head that looks at itself: 0; one that looks evenly at a grid: the mean distance of two tokens."""
    grid = (4, 5)
    mixer = create_mixer("gated_positional", Site(8, 2, grid=grid))
    with torch.no_grad():
        mixer.gate.fill_(60.0)
        mixer.position.weight.zero_()
        mixer.position.weight[0, 2] = -60.0
    model = nn.Sequential(mixer)
    with record(model) as r, torch.no_grad():
        model(torch.randn(3, *grid, 8))
    points = [(row, column) for row in range(4) for column in range(5)]
    mean = sum(math.dist(one, two) for one in points for two in points) / 400
    torch.testing.assert_close(locality(r["0"], grid, batch=3), torch.tensor([0.0, mean]), rtol=1e-5, atol=1e-6)
    with pytest.raises(SaccadeError, match="grid"):
        locality(r["0"], (9, 9), batch=3)


def test_locality_leaves_prefix_tokens_out_and_gates_free_it():
    model = create_model("convit_nano").eval()
    with torch.no_grad():
        for block, gate in zip(model.blocks[:4], (8.0, 2.0, 0.0, -8.0), strict=True):
            block.mixer.gate.fill_(gate)
        with record(model) as r:
            model(torch.randn(2, 3, 32, 32))
    found = [float(locality(r[f"blocks.{index}.mixer"], (8, 8), batch=2).mean()) for index in range(6)]
    assert found[0] < 1.3 and found == sorted(found[:4]) + found[4:]
    whole = r["blocks.5.mixer"].dense(2)
    assert whole.shape == (2, 4, 65, 65) and found[5] < 5.4  # a share of the weight lies on the class token


@pytest.mark.parametrize("name", CARD.params)
def test_parameters_are_the_papers(name):
    """The paper rounds to millions."""
    with torch.device("meta"):
        model = convit(**SIZES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(CARD.params[name], abs=1.2e6)


@pytest.mark.parametrize("local", [0, 2, 3])
def test_timm_agrees(local):
    timm = pytest.importorskip("timm.models.convit")
    torch.manual_seed(0)
    theirs = timm.ConVit(img_size=32, patch_size=8, embed_dim=8, num_heads=4, depth=3, local_up_to_layer=local,
                         num_classes=7).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = convit(32, 3, 4, local, patch=8, img_size=32, num_classes=7).eval()
    ours.name = "convit_nano"
    report = load(ours, theirs.state_dict())
    assert report.loaded == report.of and not report.left and not report.dropped
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)
