"""Classifiers by name, ours and others', with their preprocessing, the names of their classes and their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from saccade import SaccadeError, create_model
from saccade.core.weights import published
from saccade.golden import make_state, read_golden
from saccade.learn.imagenet import picture_transform
from saccade.tools.classifiers import UNTRAINED, open_classifier
from saccade.tools.explain import Question, collect


def test_classifiers_of_others_with_their_preprocessing(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    vit = open_classifier("timm:vit_tiny_patch16_224")
    settings = timm.data.resolve_model_data_config(vit.model)
    assert vit.mean == settings["mean"] == (0.5, 0.5, 0.5) and vit.notes == (UNTRAINED,)
    assert torch.equal(vit.see(picture), timm.data.create_transform(**settings)(picture))
    assert vit.shown(vit.see(picture)).size == (224, 224) and vit.class_name(7) == "class 7"
    net = open_classifier("torchvision:shufflenet_v2_x0_5")
    assert net.see(picture).shape == (3, 224, 224) and net.classes is None and not net.model.training

    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                    image_size=32, patch_size=8, id2label={0: "owl", 1: "wren", 2: "jay"})
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "bare")
    bare = open_classifier(f"hf:{tmp_path / 'bare'}")
    assert bare.classes == ["owl", "wren", "jay"] and "no preprocessing" in bare.notes[0]
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3)
    processor.save_pretrained(tmp_path / "bare")
    whole = open_classifier(f"hf:{tmp_path / 'bare'}")
    assert whole.mean == (0.4,) * 3 and whole.notes == ()
    assert torch.equal(whole.see(picture), processor(picture, return_tensors="pt")["pixel_values"][0])
    picture.save(tmp_path / "a.png")
    entry = collect(Question([tmp_path / "a.png"], f"hf:{tmp_path / 'bare'}", methods=("gradient",)))["pictures"][0]
    assert [(one["name"], one["rows"], one["prefix"]) for one in entry["attention"]] == [
        ("vit.layers.0.attention", 4, 1), ("vit.layers.1.attention", 4, 1)]
    assert entry["target"]["name"] in config.id2label.values()


def test_weights_of_others_see_pictures_as_their_card_says(tmp_path: Path) -> None:
    """Scaled by the crop of its card; weights under our names are shown pictures as `saccade train` does."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    golden = read_golden("tests/goldens/pvt_tiny.json")
    torch.save(make_state(golden), tmp_path / "authors.pth")
    theirs = open_classifier("pvt_tiny", tmp_path / "authors.pth")
    assert torch.equal(theirs.see(picture), picture_transform(published("pvt_tiny"))(picture))
    save_file(theirs.model.state_dict(), tmp_path / "ours.safetensors")
    ours = open_classifier("pvt_tiny", tmp_path / "ours.safetensors").see(picture)
    assert ours.shape == (3, 224, 224) and not torch.equal(ours, theirs.see(picture))


def test_a_checkpoint_brings_its_classes(tmp_path: Path) -> None:
    for name in ("swin_nano", "deit_nano"):
        ours = create_model(name, num_classes=7)
        save_file(ours.state_dict(), tmp_path / "seven.safetensors")
        found = open_classifier(name, tmp_path / "seven.safetensors")
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in found.model.state_dict().items())
    model = timm.create_model("resnet10t", num_classes=5)
    save_file(model.state_dict(), tmp_path / "five.safetensors")
    found = open_classifier("timm:resnet10t", tmp_path / "five.safetensors")
    assert torch.equal(found.model.fc.weight, model.fc.weight) and found.notes == ()
    with pytest.raises(SaccadeError, match="five.safetensors does not fit timm:resnet18: .*Missing"):
        open_classifier("timm:resnet18", tmp_path / "five.safetensors")
