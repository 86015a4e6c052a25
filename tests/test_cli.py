"""What a person types and reads: commands, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import create_model
from saccade.cli import main

GOLDENS = Path(__file__).parent / "goldens"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `saccade ARGUMENTS`, in this process."""
    before, sys.argv = sys.argv, ["saccade", *map(str, arguments)]
    try:
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def two_classes(root: Path, count: int, bright: str) -> Path:
    """Two classes that differ in brightness, "dark" and `bright`, so many pictures each."""
    random = np.random.default_rng(0)
    for label, level in (("dark", 60), (bright, 190)):
        (root / label).mkdir()
        for number in range(count):
            pixels = random.normal(level, 20, (20, 24, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


def completed(*arguments: object) -> None:
    """`saccade ARGUMENTS`, two epochs on small squares, ends well."""
    sys.argv = ["saccade", *map(str, arguments), "--epochs", "2", "--img-size", "16", "--batch-size", "6"]
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return two_classes(tmp_path_factory.mktemp("pictures"), 12, "bright ☀")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    completed("train", pictures, "--model", "convnext_nano", "--out", out)
    return out


def test_list_and_find_and_info(capsys):
    code, out, _ = run(capsys, "list", "swin_*", "--json")
    assert code == 0 and "swin_tiny" in json.loads(out)
    assert "bilevel_routing" in run(capsys, "list", "--kind", "mixer")[1]
    assert run(capsys, "find", "shifted", "window")[1].startswith("swin")
    facts = json.loads(run(capsys, "info", "swin_t", "--json")[1])
    assert facts["parameters"].startswith("28.29 M") and "authors" in facts["checkpoints that load"]
    assert "Neighborhood" in run(capsys, "info", "neighborhood")[1]
    restores = json.loads(run(capsys, "info", "hat_s_x2", "--json")[1])
    assert restores["parameters"].startswith("9.47 M") and not restores["maps"]
    assert json.loads(run(capsys, "info", "predformer_full_weather", "--json")[1])["multiply-adds"].count("x") == 2


def test_verify_says_pass_and_fail(capsys, tmp_path):
    golden = json.loads((GOLDENS / "swin_tiny.json").read_text())
    golden["grads"] = {}
    golden["outputs"] = {"out": golden["outputs"]["out"]}
    right, wrong = tmp_path / "right.json", tmp_path / "wrong.json"
    right.write_text(json.dumps(golden))
    golden["outputs"]["out"]["probe"]["0"] += 1.0
    wrong.write_text(json.dumps(golden))
    code, out, _ = run(capsys, "verify", right)
    assert code == 0 and "pass" in out and "FAIL" not in out
    code, out, _ = run(capsys, "verify", right, wrong)
    assert code == 1 and "FAIL" in out


def test_train_eval_predict_export(capsys, pictures, trained, tmp_path):
    written = {"model.json", "weights.safetensors", "metrics.json", "curves.json", "recipe.json"}
    assert written <= set(os.listdir(trained))
    assert {"model.onnx", "predict.py", "MODEL_CARD.md"} <= set(os.listdir(trained / "best"))
    assert json.loads((trained / "best" / "labels.json").read_text("utf-8")) == ["bright ☀", "dark"]
    code, out, _ = run(capsys, "eval", pictures, "--checkpoint", trained, "--json")
    scores = json.loads(out)
    assert code == 0 and scores == json.loads((trained / "metrics.json").read_text())["test"]
    picture = pictures / "dark" / "0.png"
    code, out, _ = run(capsys, "predict", picture, "--checkpoint", trained, "--json")
    (entry,) = json.loads(out)
    assert entry["path"] == str(picture)
    assert sum(each["probability"] for each in entry["classes"]) == pytest.approx(1, abs=1e-5)
    assert {each["class"] for each in entry["classes"]} == {"dark", "bright ☀"}
    file = tmp_path / "model.onnx"
    code, out, _ = run(capsys, "export", trained, "--onnx", file)
    assert code == 0 and file.exists() and "16x16" in out and "48x48" in out


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/saccade-was-here",)


def test_bad_input_is_one_line_and_exit_code_2(capsys, pictures, trained, tmp_path):
    """Each line names the thing and the remedy; no traceback, nothing half-written."""
    other = tmp_path / "other.pth"
    torch.save(create_model("convnext_nano").state_dict(), other)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(other.read_bytes()[:5000])
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Malicious()))
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    blocked = tmp_path / "file"
    blocked.write_text("")
    out = tmp_path / "out"
    train = ("train", pictures, "--model", "swin_nano", "--out", out, "--checkpoint")
    cases = [
        (("info", "swin_tinny"), "swin_tiny"),
        (("find", "flux capacitor"), "no card"),
        (("compare", tmp_path / "nowhere", "--models", "swin_nano"), "nowhere"),
        (("compare", pictures, "--models", "swin_nanoo"), "swin_nano"),
        (("compare", pictures, "--models", "swin_nano", "--mixers", "bilevel"), "bilevel_routing"),
        (("compare", pictures, "--models", "swin_nano", "--budget", "soon"), "soon"),
        (("compare", pictures, "--models", "swin_nano", "--out", blocked / "x"), "x"),
        (("train", pictures, "--model", "swin_nano", "--out", blocked / "x"), "another --out"),
        ((*train, other), "swin_nano"),
        ((*train, truncated), "truncated.pth"),
        ((*train, evil), "evil.pth"),
        ((*train, tmp_path / "none.pth"), "none.pth"),
        (("predict", text, "--checkpoint", trained), "text.jpg"),
        (("predict", pictures / "dark" / "0.png", "--checkpoint", tmp_path), "saccade train"),
        (("eval", pictures, "--checkpoint", trained, "--part", "tset"), "choose train, val or test"),
        (("bench", "swin_nano", "--batch", "x"), "1,8"),
        (("verify", text), "not a golden"),
        (("list", "--kind", "backbones"), "backbone or mixer"),
    ]
    for arguments, said in cases:
        code, _, err = run(capsys, *arguments)
        assert code == 2, arguments
        assert said in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err, (arguments, err)
    assert not Path("/tmp/saccade-was-here").exists()
    assert not (out / "weights.safetensors").exists()


def test_odd_flag_exits_2_and_debug_shows_the_traceback():
    command = [sys.executable, "-m", "saccade.cli"]
    odd = subprocess.run([*command, "list", "--colour"], capture_output=True, text=True)
    assert odd.returncode == 2 and "--colour" in odd.stderr and "Traceback" not in odd.stderr
    debug = subprocess.run([*command, "info", "nothing_like_it", "--debug"], capture_output=True, text=True)
    assert debug.returncode != 0 and "Traceback" in debug.stderr
