"""`saccade train` of a network that restores, from the command line to `saccade restore`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from saccade.learn.restoration.pictures import Picture, read_picture, write_picture
from tests.test_cli import run


def photographs(folder, count=4, side=64, offset=0):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (side // 8, side // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        write_picture(folder / f"{number}.png", Picture(pixels // (1 + offset)))
    return folder


BRIEF = ("--epochs", "2", "--steps", "2", "--batch-size", "2", "--patch", "8,16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    photographs(folder / "in")
    return folder


def test_trains_resumes_and_restores(capsys, trained, tmp_path):
    out = tmp_path / "run"
    line = ("train", trained / "in", "--model", "hat_nano_x2", "--out", out, "--loss", "charbonnier=1,fft=0.05", *BRIEF)
    code, told, error = run(capsys, *line)
    assert code == 0, error
    assert "note: 1 of 4 pictures are held out" in told and "dB on Y" in told
    card = json.loads((out / "restoration.json").read_text())
    assert card["model"] == "hat_nano_x2" and card["degradation"] == "x2"
    assert set(card["after"]) == set(card["before"]) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
    curves = json.loads((out / "curves.json").read_text())["curves"]
    assert curves["val_psnr_y"][-1] == pytest.approx(card["after"]["psnr_y"], abs=1e-4)
    before = (out / "weights.safetensors").read_bytes()
    assert run(capsys, *line)[0] == 0 and (out / "weights.safetensors").read_bytes() == before
    code, _, error = run(capsys, *line, "--seed", "1")
    assert code == 2 and "holds another run: seed" in error
    picture, made = trained / "in" / "0.png", tmp_path / "made.png"
    assert run(capsys, "restore", picture, made, "--checkpoint", out)[0] == 0  # the folder says which model
    assert read_picture(made).pixels.shape == (128, 128, 3)
    code, _, error = run(capsys, "restore", picture, made, "--checkpoint", out / "weights.safetensors", "--force")
    assert code == 2 and "give --model NAME" in error
    code, _, error = run(capsys, *line[:4], "--out", tmp_path / "more", "--checkpoint", out, *BRIEF)
    assert code == 0, error


def test_pairs_and_given_parts(capsys, tmp_path):
    for part in ("train", "val"):
        photographs(tmp_path / "clean" / part, 2)
        photographs(tmp_path / "dark" / part, 2, offset=1)
    code, told, error = run(capsys, "train", tmp_path / "clean", "--degraded", tmp_path / "dark", "--model", "maxim_s1",
                            "--out", tmp_path / "run", "--epochs", "1", "--steps", "1", "--batch-size", "1",
                            "--patch", "16")
    assert code == 0, error
    card = json.loads((tmp_path / "run" / "restoration.json").read_text())
    assert "held out" not in told and card["degradation"] == str(tmp_path / "dark")
    assert card["before"]["psnr_rgb"] < 12  # half as bright


def test_bad_input_is_one_line_and_exit_code_2(capsys, trained, tmp_path):
    photographs(tmp_path / "one", 1)
    photographs(tmp_path / "other", 3)
    photographs(tmp_path / "wide", 4, side=128)
    broken = photographs(tmp_path / "broken", 3)
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    clean, x2, out = trained / "in", ("--model", "hat_nano_x2"), tmp_path / "out"
    for told, line in {
        "64x64 pixels are too few for patches of 96 (4 pictures are too small)": (clean, *x2, "--patch", "48"),
        "have no partner of the same name (3)":
            (clean, "--model", "maxim_s1", "--degraded", tmp_path / "other", "--patch", "8"),
        "are not 1 times the 128x128 of its partner":
            (clean, "--model", "maxim_s1", "--degraded", tmp_path / "wide", "--patch", "8"),
        "there is no degradation 'snow'; there are x2": (clean, *x2, "--degradation", "snow"),
        "hat_nano_x2 makes pictures 2 times as large and x4 makes them 4 times as small: choose x2":
            (clean, *x2, "--degradation", "x4"),
        "maxim_s1 does not enlarge: say what": (clean, "--model", "maxim_s1"),
        "give one of the two": (clean, *x2, "--degradation", "x2", "--degraded", clean),
        "1 picture that can be read; two are needed": (tmp_path / "one", *x2, "--patch", "8"),
        "holds no picture": (tmp_path / "empty", *x2),
        "there is no such folder": (tmp_path / "none", *x2),
        "mend or remove it": (broken, *x2, "--patch", "8", "--strict"),
        "loss huber: choose of l1": (clean, *x2, "--loss", "huber"),
        "--loss l1=much": (clean, *x2, "--loss", "l1=much"),
        "--patch 8x8": (clean, *x2, "--patch", "8x8"),
        "at most one for each of the 1 epochs": (clean, *x2, "--patch", "8,16", "--epochs", "1"),
        "--img-size means nothing to hat_nano_x2, which restores": (clean, *x2, "--img-size", "64"),
        "text_prompt_ir restores by a sentence": (clean, "--model", "text_prompt_ir", "--degradation", "noise25"),
        "--degradation means nothing to swin_nano, which classifies":
            (clean, "--model", "swin_nano", "--degradation", "x2"),
        "drct_x2": (clean, "--model", "drct_x2", "--checkpoint", tmp_path / "none.pth"),
    }.items():
        code, _, error = run(capsys, "train", *line, "--out", out)
        assert code == 2 and error.count("\n") == 1, error
        assert told in error or told == "drct_x2" and "no such file" in error, error
        assert not out.exists()


def test_a_broken_picture_is_left_out_and_told(capsys, tmp_path):
    broken = photographs(tmp_path / "in", 4)
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:60])
    code, told, error = run(capsys, "train", broken, "--model", "hat_nano_x2", "--out", tmp_path / "out", *BRIEF)
    assert code == 0, error
    assert "1.png: cannot be decoded" in told and "1 of 3 pictures are held out" in told


@pytest.fixture(scope="module")
def restorer(trained):
    from saccade.core.build import create_model
    from saccade.core.checkpoint import write_safetensors

    folder = trained / "restorer"
    folder.mkdir()
    (folder / "restoration.json").write_text(json.dumps({"model": "hat_nano_x2"}))
    write_safetensors(folder / "weights.safetensors", create_model("hat_nano_x2").state_dict(), {})
    return folder


def test_commands_for_classifiers_tell_what_restores(capsys, trained, restorer, tmp_path):
    picture = trained / "in" / "0.png"
    for line in (("predict", picture, "--checkpoint", restorer), ("eval", trained / "in", "--checkpoint", restorer),
                 ("explain", picture, "--model", restorer, "--out", tmp_path / "page.html")):
        code, _, error = run(capsys, *line)
        assert code == 2 and error.count("\n") == 1
        assert "a network that restores pictures: use `saccade restore" in error and "--checkpoint" in error
    code, _, error = run(capsys, "explain", picture, "--model", "hat_nano_x2", "--out", tmp_path / "page.html")
    assert code == 2 and "saccade.attribution.restoration" in error


def test_a_run_is_exported_and_networks_that_restore_race(capsys, restorer, tmp_path):
    pytest.importorskip("onnxruntime")
    code, told, error = run(capsys, "export", restorer, "--onnx", tmp_path / "x.onnx", "--size", "16")
    assert code == 0 and "16x16 differs by" in told, error
    code, told, error = run(capsys, "bench", "hat_nano_x2", "--size", "16", "--batch", "1", "--rounds", "1", "--json")
    assert code == 0, error
    assert json.loads(told)[0]["params"] > 250_000
