"""Every key is accounted for, both ways."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model, load
from saccade.core.keymap import Dropped, matrix_from_1x1, rename


def state(**options):
    return create_model("swin_nano", num_classes=4, **options).state_dict()


def test_a_missing_entry_is_named():
    broken = state()
    broken.pop("stages.1.blocks.0.mixer.qkv.weight")
    with pytest.raises(SaccadeError, match=r"1 entries of the model are not in the file \(stages.1.blocks.0.mixer.qkv"):
        load(create_model("swin_nano", num_classes=4), broken)


def test_an_unknown_entry_is_named():
    with pytest.raises(SaccadeError, match="not in the model .*teacher.weight"):
        load(create_model("swin_nano", num_classes=4), state() | {"teacher.weight": torch.zeros(3)})


def test_nothing_changes_when_loading_fails():
    model = create_model("swin_nano", num_classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SaccadeError):
        load(model, state() | {"teacher.weight": torch.zeros(3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_model_is_refused():
    with pytest.raises(SaccadeError, match="swin_nano"):
        load(create_model("swin_nano"), create_model("convnext_nano").state_dict())
    with pytest.raises(SaccadeError, match="not a checkpoint of swin_nano"):
        load(create_model("swin_nano"), {"a": torch.zeros(2), "b": torch.zeros(2)})


def test_another_head_says_what_to_write_and_fresh_heeds_it():
    with pytest.raises(SaccadeError, match=r"fresh=\('head.fc.\*',\)"):
        load(create_model("swin_nano", num_classes=7), state())
    model = create_model("swin_nano", num_classes=7)
    report = load(model, state(), fresh=("head.fc.*",))
    assert report.fresh == ["head.fc.bias", "head.fc.weight"] and report.loaded == report.of - 2
    with pytest.raises(SaccadeError, match="matches no entry"):
        load(model, state(), fresh=("haed.*",))


def test_a_removed_head_is_reported_as_dropped():
    report = load(create_model("swin_nano", num_classes=0), state())
    assert set(report.dropped) == {"head.fc.weight", "head.fc.bias"}
    features = create_model("swin_nano", features_only=True)
    assert set(load(features, state()).dropped) == {"head.fc.weight", "head.fc.bias"}


def test_a_bias_table_of_another_window_is_resampled():
    """Bicubic over the offsets, as Swin's own code."""
    source = state()
    report = load(create_model("swin_nano", num_classes=4, window=3), source)
    assert "stages.0.blocks.0.mixer.bias.table" in report.resized


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_input_channels(channels):
    """One channel: the kernels summed, so gray pictures give what RGB copies gave."""
    source = state()
    model = create_model("swin_nano", num_classes=4, in_chans=channels)
    assert load(model, source).resized == ["stem.proj.weight"]
    rgb = source["stem.proj.weight"]
    if channels == 1:
        torch.testing.assert_close(model.stem.proj.weight.detach(), rgb.sum(1, keepdim=True))
    else:
        torch.testing.assert_close(model.stem.proj.weight[:, 1].detach(), rgb[:, 1] * 3 / channels)


def test_options_that_contradict_are_errors():
    with pytest.raises(SaccadeError, match="fresh"):
        create_model("swin_nano", fresh=("head.*",))
    with pytest.raises(SaccadeError, match="features_only"):
        create_model("swin_nano", out_indices=(0,))
    with pytest.raises(SaccadeError, match="did you mean num_classes"):
        create_model("swin_nano", num_class=3)
    with pytest.raises(SaccadeError, match="img_size"):
        create_model("swin_nano", img_size=0)


def test_key_maps_join_split_change_and_drop():
    q, k = torch.ones(2, 3), torch.zeros(2, 3)
    rules = (
        (r"(.*)\.q", r"\1.qk#0"), (r"(.*)\.k", r"\1.qk#1"), (r"pair", ("first", "second")),
        (r"conv", "matrix", matrix_from_1x1), Dropped("index", "derived buffer"),
    )
    authors = {"a.k": k, "a.q": q, "pair": torch.arange(4), "conv": torch.ones(2, 3, 1, 1), "index": q, "own": k}
    found = rename(authors, rules)
    assert torch.equal(found.state["a.qk"], torch.cat([q, k]))
    assert found.state["first"].tolist() == [0, 1] and found.state["second"].tolist() == [2, 3]
    assert found.state["matrix"].shape == (2, 3) and found.dropped == {"index": "derived buffer"}
    assert found.sources["a.qk"] == ["a.k", "a.q"] and "own" in found.state
