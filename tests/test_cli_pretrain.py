"""`saccade pretrain` and `probe` as a person types them, and what goes on from their result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saccade.tools.contestants import pretrained_contestants
from tests.test_cli import completed, run, two_classes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return two_classes(tmp_path_factory.mktemp("pictures"), 10, "bright")


@pytest.fixture(scope="module")
def pretrained(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    completed("pretrain", pictures, "--method", "rotnet", "--model", "deit_nano", "--out", out)
    return out


def test_probe(capsys, pictures, pretrained):
    assert json.loads((pretrained / "pretraining.json").read_text())["method"] == "rotnet"
    code, out, _ = run(capsys, "probe", pictures, "--checkpoint", pretrained, "--pooling", "cae,multi_head",
                       "--epochs", "2", "--json")
    found = json.loads(out)
    assert code == 0 and list(found) == ["linear", "knn", "cae", "multi_head"]
    assert all(0 <= scores["accuracy"] <= 1 for scores in found.values())
    weights = pretrained / "weights.safetensors"
    code, out, _ = run(capsys, "probe", pictures, "--checkpoint", weights, "--model", "deit_nano", "--img-size", "16",
                       "--json")
    assert code == 0 and json.loads(out)["knn"] == found["knn"]


def test_fine_tuning_goes_on_from_it(capsys, pictures, pretrained, tmp_path):
    code, out, _ = run(capsys, "train", pictures, "--model", "deit_nano", "--checkpoint", pretrained, "--out",
                       tmp_path / "tuned", "--epochs", "1", "--img-size", "16", "--batch-size", "6")
    assert code == 0 and "deit_nano: validation" in out


def test_contestants_start_from_it(pretrained):
    (one,) = pretrained_contestants([f"mine={pretrained}"], 16)
    weights = load_file(pretrained / "weights.safetensors")
    assert one.name == "mine" and one.weights and one.build is not None
    for classes in (0, 3):
        state = one.build(classes, True).state_dict()
        assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert not torch.equal(one.build(3, False).state_dict()["position"], weights["position"])


def test_bad_input(capsys, pictures, pretrained, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    asked = ("--model", "deit_nano", "--out", out)
    cases = [
        (("pretrain", pictures, "--method", "rotnett", *asked), "did you mean rotnet"),
        (("pretrain", pictures, "--method", "mae:ratoi=0.5", *asked), "has no option 'ratoi'"),
        (("pretrain", pictures, "--method", "spark:width=32", *asked), "pyramid"),
        (("pretrain", pictures, "--method", "rotnet", "--model", "hat_s_x2", "--out", out), "hat_s_x2"),
        (("pretrain", tmp_path / "empty", "--method", "rotnet", *asked), "no pictures in it"),
        (("pretrain", tmp_path / "nowhere", "--method", "rotnet", *asked), "nowhere"),
        (("pretrain", pictures, "--method", "rotnet", *asked, "--strategy", "magic"), "choose auto, ddp, fsdp"),
        (("pretrain", pictures, "--method", "rotnet", *asked, "--average", "1.5"), "average is 1.5"),
        (("probe", pictures, "--checkpoint", pretrained, "--pooling", "cea"), "choose from linear"),
        (("probe", pictures, "--checkpoint", tmp_path / "empty"), "--model NAME"),
        (("probe", pictures, "--checkpoint", tmp_path / "empty", "--model", "deit_nano"), "saccade pretrain"),
        (("compare", pictures, "--checkpoint", "a"), "LABEL=FOLDER"),
    ]
    for arguments, said in cases:
        code, _, err = run(capsys, *arguments)
        assert code == 2, arguments
        assert said in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err, (arguments, err)
    assert not out.exists()
