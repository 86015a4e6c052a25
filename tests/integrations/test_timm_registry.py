"""timm's create_model builds ours, and what stands on timm's names gets it."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

import saccade
from saccade import create_model, list_models, register_with_timm

NO_BACKBONES = ("maxim_", "hat_", "drct_", "rgt_", "dlgsanet_", "text_prompt_ir", "dtop_", "rotnet_", "ddrnet_")


def test_every_model_is_registered_once():
    names = register_with_timm()
    assert names == [f"saccade_{name}" for name in list_models() if not name.startswith(NO_BACKBONES)]
    assert set(names) <= set(timm.list_models("saccade_*"))
    assert register_with_timm("swin_*") == [f"saccade_{name}" for name in list_models("swin_*")]


def test_timm_builds_the_same_model():
    register_with_timm()
    theirs = timm.create_model("saccade_rmt_nano", num_classes=7, in_chans=1, drop_path_rate=0.1).eval()
    ours = create_model("rmt_nano", num_classes=7, in_chans=1).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 1, 41, 29)
    assert torch.equal(theirs(image), ours(image)) and theirs(image).shape == (2, 7)
    assert timm.data.resolve_model_data_config(theirs)["input_size"] == (1, 32, 32)


def test_features_only():
    register_with_timm()
    model = timm.create_model("saccade_swin_nano", features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [32, 128] and model.feature_info.reduction() == [2, 8]
    assert [tuple(value.shape) for value in model(torch.randn(1, 3, 32, 48))] == [(1, 32, 16, 24), (1, 128, 4, 6)]


def test_an_unknown_option_is_our_one_line():
    register_with_timm()
    with pytest.raises(saccade.SaccadeError, match="drop_path_rate"):
        timm.create_model("saccade_swin_nano", drop_path=0.1)


def test_unet_of_segmentation_models_pytorch():
    register_with_timm()
    model = smp.Unet("tu-saccade_convnext_tiny", encoder_weights=None, in_channels=1, classes=3).eval()
    image = torch.randn(1, 1, 64, 96)
    with torch.no_grad():
        out = model(image)
        maps = model.encoder(image)
    assert out.shape == (1, 3, 64, 96)
    # The Unet decodes our own maps, not copies of something else.
    own = model.encoder.model.features(image)
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(maps[-len(own):], own, strict=True))
