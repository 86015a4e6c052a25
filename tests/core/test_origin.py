"""Whose weights a training began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saccade.core import origin as room
from saccade.core import weights as store
from saccade.core.card import Weights
from saccade.core.files import sha256_of
from saccade.core.origin import Origin, of_model
from saccade.learn.runs import UNSAID, origin_of

THEIRS = Origin("https://example.org/theirs.pth", "ImageNet-1K", "MIT")


def test_a_run_tells_what_it_began_with_and_so_do_its_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_text("")
    (tmp_path / "model.json").write_text(json.dumps({"origin": vars(THEIRS)}))
    assert origin_of(tmp_path) == origin_of(tmp_path / "weights.safetensors") == THEIRS
    (tmp_path / "model.json").write_text("{}")  # of a version that did not tell
    assert origin_of(tmp_path) == UNSAID and "unknown licence" in UNSAID.warning
    (tmp_path / "model.json").rename(tmp_path / "pretraining.json")
    (tmp_path / "pretraining.json").write_text(json.dumps({"origin": vars(Origin("pre-training by mae"))}))
    assert origin_of(tmp_path).source == "pre-training by mae" and not origin_of(tmp_path).warning
    assert origin_of(None) == Origin() and not Origin().warning


def test_published_weights_are_known_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "renamed.pth"
    file.write_bytes(b"theirs")
    assert origin_of(file) == Origin("renamed.pth", licence="unknown")
    known = Weights(THEIRS.source, sha256=sha256_of(file)[:8], licence="MIT")
    for module in (store, room):
        monkeypatch.setattr(module, "published", lambda name: known)
    assert origin_of(file) == THEIRS
    file.write_bytes(b"others")
    assert origin_of(file).licence == "unknown"


def test_origin_of_a_model_is_on_its_card() -> None:
    assert of_model("swin_tiny") == Origin(store.published("swin_tiny").source, "ImageNet-1K", "MIT")
    assert not of_model("swin_tiny").warning
