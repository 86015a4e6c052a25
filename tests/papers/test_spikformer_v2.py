"""Spikformer: neurons against loops, counts, time, rates, masked pre-training."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.ops.spiking import fire
from saccade.papers.spikformer_v2 import MaskedSpikes, SpikingAttention
from saccade.parts.pixels import image_of, patches_of


def test_neurons_against_a_loop():
    current = 2 * torch.randn(5, 40, dtype=torch.float64)
    wanted = torch.zeros_like(current)
    for neuron in range(40):
        membrane = 0.0
        for step in range(5):
            membrane += (float(current[step, neuron]) - membrane) / 2
            if membrane >= 1:
                wanted[step, neuron], membrane = 1, 0.0
    assert torch.equal(fire(current), wanted) and 20 < wanted.sum() < 180


def test_gradient_is_the_sigmoid_s_slope_without_the_reset():
    current = torch.tensor([[2.4], [0.7]], dtype=torch.float64, requires_grad=True)
    fire(current)[1].sum().backward()
    # h1 = 1.2 fires, so the second step starts anew: nothing comes from the first, and h2 = 0.35.
    share = torch.sigmoid(torch.tensor(4 * (0.35 - 1.0), dtype=torch.float64))
    torch.testing.assert_close(current.grad[:, 0], torch.stack([torch.zeros_like(share), 2 * share * (1 - share)]))


def test_half_precision_keeps_its_membrane():
    current = torch.full((3, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    assert torch.equal(fire(current).float(), fire(current.float()))


def test_counts_are_whole_and_both_orders_agree():
    site = Site(32, 2, grid=(5, 7))
    module = SpikingAttention(site, pairwise=True).eval()
    x = torch.randn(8, 5, 7, 32) * 3
    with torch.no_grad():
        plain = module(x)
        with record(torch.nn.Sequential(module)) as r:
            assert torch.equal(plain, torch.nn.Sequential(module)(x))
    weights = r["0"].parts[0].weights / module.scale
    assert weights.shape == (8, 2, 35, 35) and torch.equal(weights, weights.round()) and 0 < weights.max() <= 16
    assert set(plain.unique().tolist()) <= {0.0, 1.0}


def test_the_mixer_is_its_steps_averaged():
    mixer = create_mixer("spiking_self_attention", Site(32, 2, grid=(5, 7)), steps=3).eval()
    x = torch.randn(2, 5, 7, 32) * 3
    with torch.no_grad():
        wanted = SpikingAttention.forward(mixer, x.repeat(3, 1, 1, 1)).unflatten(0, (3, 2)).mean(0)
        torch.testing.assert_close(mixer(x), wanted)


def test_reach_is_global_where_counts_do_not_saturate():
    """Counts over hundreds of busy tokens pass the threshold whatever one does; between two tokens one matters."""
    torch.manual_seed(0)
    mixer = create_mixer("spiking_self_attention", Site(32, 2, grid=(27, 29)), scale=0.01, threshold=0.1).eval()
    x = torch.zeros(1, 27, 29, 32)
    x[0, 26, 28] = 3 * torch.randn(32)
    moved = x.clone()
    moved[0, 0, 0] = 3 * torch.randn(32)
    with torch.no_grad():
        assert (mixer(moved) - mixer(x))[0, 26, 28].abs().max() > 0


def test_features_are_rates_of_every_step():
    model = create_model("spikformer_nano", num_classes=3, threshold=0.2).eval()
    image = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        maps, tokens = model.features(image), model.tokens(image)[0]
        torch.testing.assert_close(model(image), model.head(maps[-1].mean((2, 3))))
    assert tokens.shape == (8, 80, 64) and set(tokens.unique().tolist()) <= {0.0, 1.0, 2.0}
    assert maps[0].max() > 0 and torch.equal(maps[-1] * 4, (maps[-1] * 4).round())


def test_patches_and_back():
    for size in ((12,), (8, 12), (4, 8, 12)):
        image = torch.randn(2, 3, *size)
        patches = patches_of(image, 4)
        assert torch.equal(image_of(patches, 4, tuple(side // 4 for side in size)), image)
    assert torch.equal(patches_of(torch.arange(64.0).view(1, 1, 8, 8), 4)[0, 1].view(4, 4)[0], torch.arange(4.0, 8))


def test_masked_pretraining():
    """The loss looks at masked pixels alone, blocks at the others alone; everything that takes part learns."""
    model = create_model("spikformer_v2_nano", num_classes=0)
    task = MaskedSpikes(model, ratio=0.5, dim=32, depth=1, heads=2).eval()
    image = torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, 64).argsort(1) < 32
    hidden = image_of(mask[..., None].expand(2, 64, 48).float(), 4, (8, 8))
    with torch.no_grad():
        first = task(image, mask)
        other = task(image + hidden * torch.randn(2, 3, 32, 32), mask)
        assert torch.equal(first["guess"], other["guess"]) and first["loss"] != other["loss"]
        assert first["guess"].shape == (2, 64, 48)
    drawn = task.train()(image)
    drawn["loss"].backward()
    assert (drawn["mask"].sum(1) == 32).all()
    assert [name for name, value in task.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_bad_numbers_are_one_line():
    for make in (lambda: create_model("spikformer_nano", patch=3), lambda: create_model("spikformer_nano", steps=0),
                 lambda: MaskedSpikes(create_model("spikformer_v2_nano"), ratio=1.0),
                 lambda: MaskedSpikes(create_model("spikformer_v2_nano"))(torch.randn(1, 3, 48, 48))):
        with pytest.raises(SaccadeError):
            make()
