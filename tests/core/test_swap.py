"""Swapping mixers in our own models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import saccade
from saccade import SaccadeError, create_model
from saccade.papers.metaformer import Pooling
from saccade.papers.nat import Neighborhood

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STAGE = "stages.1.*.mixer"


def nano(name="swin_nano", **options):
    torch.manual_seed(0)
    return create_model(name, num_classes=3, **options).eval()


def test_swap_builds_at_the_site_and_undo_restores_the_same_modules():
    model = nano()
    before, old = model(IMAGE), [block.mixer for block in model.stages[1].blocks]
    handle = saccade.swap(model, STAGE, "neighborhood", kernel=3)
    assert handle.names == ["stages.1.blocks.0.mixer", "stages.1.blocks.1.mixer"]
    for block in model.stages[1].blocks:
        assert isinstance(block.mixer, Neighborhood)
        assert (block.mixer.kernel, block.mixer.heads, block.mixer.proj.in_features) == (3, 2, 64)
    assert not torch.allclose(model(IMAGE), before)
    handle.undo()
    handle.undo()  # nothing left to do
    assert all(block.mixer is mixer for block, mixer in zip(model.stages[1].blocks, old, strict=True))
    assert torch.equal(model(IMAGE), before)


def test_a_block_names_its_mixer_as_in_create_model():
    by_swap, by_create = nano(), nano(mixer={"stages.2.blocks.1": Pooling})
    assert saccade.swap(by_swap, "stages.2.blocks.1", Pooling).names == ["stages.2.blocks.1.mixer"]
    assert str(by_swap) == str(by_create)


def test_a_callable_sees_its_site_and_takes_options():
    sites = []

    def make(site, kernel):
        sites.append(site)
        return Pooling(site, kernel)

    model = nano()
    saccade.swap(model, "*.mixer", make, kernel=5)
    assert [(site.dim, site.stage, site.index, site.grid) for site in sites] == [
        (32, 0, 0, (16, 16)), (64, 1, 0, (8, 8)), (64, 1, 1, (8, 8)), (128, 2, 0, (4, 4)), (128, 2, 1, (4, 4))]
    assert model.stages[0].blocks[0].mixer.kernel == 5


@pytest.mark.parametrize("training", [True, False])
def test_dtype_and_training_flag_follow_the_place_there_and_back(training):
    model = nano().double().train(training)
    handle = saccade.swap(model, STAGE, "neighborhood", kernel=3)
    mixer = model.stages[1].blocks[0].mixer
    assert mixer.qkv.weight.dtype == torch.float64 and mixer.training is training
    model.float().train(not training)
    handle.undo()
    mixer = model.stages[1].blocks[0].mixer
    assert mixer.qkv.weight.dtype == torch.float32 and mixer.training is not training
    assert model(IMAGE).dtype == torch.float32


def test_keep_weights_copies_the_projections():
    model = nano()
    old = model.stages[1].blocks[0].mixer
    saccade.swap(model, STAGE, "neighborhood", keep_weights=True, kernel=3)
    new = model.stages[1].blocks[0].mixer
    for part in ("qkv", "proj"):
        for mine, theirs in zip(getattr(new, part).parameters(), getattr(old, part).parameters(), strict=True):
            assert torch.equal(mine, theirs) and mine is not theirs


@pytest.mark.parametrize("mixer, options, message", [
    ("pooling", {}, "Pooling at stages.1.blocks.0.mixer declares no projections"),
    ("neighborhood", dict(qkv_bias=False), r"qkv.bias of .* is \(192,\) in the old and missing in"),
])
def test_keep_weights_names_what_is_missing_and_changes_nothing(mixer, options, message):
    model = nano()
    before = model(IMAGE)
    with pytest.raises(SaccadeError, match=message):
        saccade.swap(model, STAGE, mixer, keep_weights=True, **options)
    assert torch.equal(model(IMAGE), before)


def test_stacked_swaps_are_undone_last_first():
    model = nano()
    before = model(IMAGE)
    first = saccade.swap(model, STAGE, "pooling")
    between = model(IMAGE)
    second = saccade.swap(model, "stages.1.blocks.1.mixer", "depthwise")
    with pytest.raises(SaccadeError, match="stages.1.blocks.1.mixer was swapped again since"):
        first.undo()
    second.undo()
    assert torch.equal(model(IMAGE), between)
    first.undo()
    assert torch.equal(model(IMAGE), before)


def test_swaps_of_different_places_are_undone_in_any_order():
    model = nano()
    before = model(IMAGE)
    first, second = (saccade.swap(model, f"stages.{stage}.*.mixer", "pooling") for stage in (0, 1))
    first.undo()
    second.undo()
    assert torch.equal(model(IMAGE), before)


def test_no_match_names_the_closest():
    with pytest.raises(SaccadeError, match="did you mean stages.2.blocks.0.mixer"):
        saccade.swap(nano(), "stages.2.blocks.0.mixr", "pooling")
    with pytest.raises(SaccadeError, match="has no option 'kernl'; did you mean kernel"):
        saccade.swap(nano(), STAGE, "neighborhood", kernl=3)


def test_beside_a_class_token_the_caller_says_what_it_receives():
    model = nano("deit_nano")
    with pytest.raises(SaccadeError, match="prefix_mode"):
        saccade.swap(model, "blocks.*.mixer", "neighborhood")
    first = saccade.swap(model, "blocks.*.mixer", "neighborhood", prefix_mode="mean", keep_weights=True, kernel=3)
    assert first.names == [f"blocks.{index}.mixer" for index in range(6)]
    built = create_model("deit_nano", num_classes=3, mixer="neighborhood", prefix_mode="mean", kernel=3).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(model(IMAGE), built(IMAGE))
    kept = copy.deepcopy(model)
    saccade.swap(model, "blocks.*.mixer", "attention", keep_weights=True)  # through the wrapper around each mixer
    assert torch.equal(model(IMAGE), nano("deit_nano")(IMAGE))
    assert torch.equal(pickle.loads(pickle.dumps(kept))(IMAGE), built(IMAGE))
