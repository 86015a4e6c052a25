"""`saccade pretrain` and `probe` as a person types them, and what goes on from their result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saccade.tools.contestants import pretrained_contestants
from tests.learn.test_scenes import scenes
from tests.learn.test_volumes import volumes
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


NARROW = "dim=32,depth=1,heads=2"


def test_scenes_of_several_modalities(capsys, pictures, tmp_path):
    """Pre-trained on three, the model goes on from any of them: pictures alone are probed."""
    out = tmp_path / "run"
    completed("pretrain", scenes(tmp_path / "rooms"), "--method", f"multimae:{NARROW}", "--model", "multivit_nano",
              "--out", out, "--epochs", "1", "--batch-size", "4", "--img-size", "16", "--accumulate", "2")
    curves = json.loads((out / "curves.json").read_text())["curves"]
    assert {"train_rgb", "train_depth", "train_semseg"} < set(curves)
    assert {f"stem.{name}.proj.weight" for name in ("rgb", "depth", "semseg")} < set(
        load_file(out / "weights.safetensors"))
    capsys.readouterr()
    code, said, _ = run(capsys, "probe", pictures, "--checkpoint", out, "--json")
    assert code == 0 and list(json.loads(said)) == ["linear", "knn"]


def test_volumes(capsys, pictures, tmp_path):
    """Pre-trained on volumes, the model is one of pictures too."""
    out = tmp_path / "run"
    completed("pretrain", volumes(tmp_path / "scans"), "--method", f"uni4eye:{NARROW}", "--model", "uni4eye_nano",
              "--out", out, "--epochs", "1", "--batch-size", "2", "--img-size", "8")
    assert {"train_image", "train_edges"} < set(json.loads((out / "curves.json").read_text())["curves"])
    capsys.readouterr()
    code, said, _ = run(capsys, "probe", pictures, "--checkpoint", out, "--json")
    assert code == 0 and list(json.loads(said)) == ["linear", "knn"]


def test_one_kind_where_another_is_expected(capsys, pictures, tmp_path):
    rooms, scans, out = scenes(tmp_path / "rooms"), volumes(tmp_path / "scans"), tmp_path / "out"
    (tmp_path / "both").mkdir()
    for file in (scans / "0.npy", rooms / "rgb/room/0.png"):
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    (rooms / "depth/room/3.npy").unlink()
    multimae, uni4eye = ("--method", f"multimae:{NARROW}"), ("--method", f"uni4eye:{NARROW}")
    cases = [
        ((rooms, *multimae, "--model", "multivit_nano"), "rgb/room/3.png: has no partner"),
        ((rooms, *multimae, "--model", "deit_nano"), "multivit_base"),
        ((scans, *multimae, "--model", "multivit_nano"), "0.npy: a volume, and multimae learns"),
        ((scans, "--method", "rotnet", "--model", "deit_nano"), "0.npy: a volume, and rotnet learns"),
        ((scans, *uni4eye, "--model", "deit_nano"), "uni4eye_vit_base_patch16 takes volumes"),
        ((scans, *uni4eye, "--model", "uni4eye_nano", "--img-size", "10"), "10"),
        ((tmp_path / "both", *uni4eye, "--model", "uni4eye_nano"), "pictures and volumes (0.npy)"),
        ((pictures, "--method", f"mae:{NARROW}", "--model", "deit_nano", "--img-size", "30"), "30"),
    ]
    for arguments, said in cases:
        code, _, err = run(capsys, "pretrain", *arguments, "--out", out)
        assert code == 2, arguments
        assert said in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err, (arguments, err)
    assert not out.exists()
