"""Expedite: its two operators beside loops, SAM's encoder as a host, maps of every block."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from saccade import SaccadeError, apply, create_model
from saccade.papers.expedite import bands, cluster, near_cells, reconstruct
from saccade.parts.attention import Attention
from saccade.parts.plain import Plain
from tests.contracts.registered import randomised


def test_clustering_beside_loops():
    x, cells, window, temperature = torch.randn(1, 5, 7, 3, dtype=torch.float64), (2, 3), 3, 0.5
    found = cluster(x, cells, rounds=2, temperature=temperature, window=window)[0]
    own = {(i, j): (i * 2 // 5, j * 3 // 7) for i in range(5) for j in range(7)}
    means = torch.nn.functional.adaptive_avg_pool2d(x.movedim(-1, 1), cells)[0]
    centroids = {(a, b): means[:, a, b] for a in range(2) for b in range(3)}
    for _ in range(2):
        total, weight = {key: 0.0 for key in centroids}, {key: 0.0 for key in centroids}
        for place, (a, b) in own.items():
            near = [key for key in centroids if abs(key[0] - a) <= 1 and abs(key[1] - b) <= 1]
            apart = torch.stack([(centroids[key] - x[0][place]).square().sum() for key in near])
            for key, share in zip(near, (-temperature * apart).softmax(0), strict=True):
                total[key], weight[key] = total[key] + share * x[0][place], weight[key] + share
        centroids = {key: total[key] / weight[key] for key in centroids}
    torch.testing.assert_close(found, torch.stack(list(centroids.values())))


def test_bands_hold_all_clusters_that_are_near():
    """Every token is in one band, whose clusters are all those that it may belong to."""
    for grid, cells, radius in (((5, 7), (2, 3), 1), ((32, 32), (22, 22), 2), ((14, 14), (9, 9), 2),
                                ((3, 2), (5, 4), 1), ((6, 5), (3, 5), 0), ((1, 9), (1, 4), 2)):
        near, left = near_cells(grid, cells, radius, torch.device("cpu")) == 0, list(range(grid[0] * grid[1]))
        for here, reach in bands(grid, cells, radius):
            assert left[:here.stop - here.start] == list(range(here.start, here.stop))
            left = left[here.stop - here.start:]
            assert near[reach, here].sum() == near[:, here].sum()
        assert not left


def test_the_default_is_the_published_setting():
    """ViT-L at 640 pixels: clusters after ten blocks of 24, 28 x 28 of them (Expedit-Segmenter, location 9 from 0)."""
    host = Plain(dim=8, depth=24, heads=1, patch=16, img_size=640, mixer=Attention)
    apply(host, "expedite")
    assert [block.begins for block in host.blocks].index(True) == 10
    assert host.blocks[10].hourglass.cells((40, 40)) == (28, 28)


def test_reconstruction_beside_loops():
    before, after, x = (torch.randn(1, count, 4, dtype=torch.float64) for count in (6, 5, 5))
    for token, found in enumerate(reconstruct(x, before, after, nearest=2, temperature=0.3)[0]):
        alike = (-0.3 * (before[0, token] - after[0]).square().sum(-1)).exp()
        best = alike.argsort(descending=True)[:2]
        torch.testing.assert_close(found, (alike[best, None] * x[0, best]).sum(0) / alike[best].norm())


def test_maps_of_every_block():
    model = randomised(create_model("deit_nano")).eval()
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        before = model.features(image)
        handle = apply(model, "expedite", keep=0.5, start=2)
        maps = model.features(image)
        assert [each.shape for each in maps] == [each.shape for each in before]
        torch.testing.assert_close(maps[1], before[1])
        assert not any(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(maps[2:], before[2:]))
        handle.undo()
        assert torch.equal(model.features(image)[-1], before[-1])


def sam(**options):
    settings = dict(hidden_size=16, output_channels=8, num_hidden_layers=4, num_attention_heads=2, image_size=80,
                    patch_size=8, mlp_dim=16, global_attn_indexes=[1, 3], window_size=4)
    torch.manual_seed(0)
    return randomised(SamVisionEncoder(SamVisionConfig(**settings | options))).eval()


def test_sam_as_a_host():
    model, image = sam(), torch.randn(2, 3, 80, 80)
    keys = set(model.state_dict())
    with torch.no_grad():
        before = model(image).last_hidden_state
        handle = apply(model, "expedite", keep=0.57, start=2)  # 3 x 3 clusters of windows of 4 x 4
        out = model(image).last_hidden_state
        assert out.shape == before.shape and not torch.allclose(out, before, atol=1e-3)
        torch.testing.assert_close(torch.cat([model(one[None]).last_hidden_state for one in image]), out)
        assert torch.equal(copy.deepcopy(model)(image).last_hidden_state, out)
        assert set(model.state_dict()) == keys
        handle.undo()
        assert torch.equal(model(image).last_hidden_state, before)
        apply(model, "expedite", keep=1.0)
        assert torch.equal(model(image).last_hidden_state, before)


def test_bad_input():
    with pytest.raises(SaccadeError, match="0 to 5"):
        apply(create_model("deit_nano"), "expedite", start=9)
    with pytest.raises(SaccadeError, match="keep=0"):
        apply(create_model("deit_nano"), "expedite", keep=0)
    with pytest.raises(SaccadeError, match="global"):
        apply(sam(window_size=0), "expedite")
