"""Pre-training: to a folder and on from where it was killed, guards, over processes, and what a probe finds in it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from saccade import SaccadeError, create_model
from saccade.learn import epochs
from saccade.learn.data import open_images, open_pictures
from saccade.learn.epochs import Schedule
from saccade.learn.pretrain import Pretraining, open_encoder, opened, pretrain
from saccade.learn.views import views
from tests.test_cli import run

RECIPE = Pretraining(epochs=2, batch_size=16, img_size=16, method="mae",
                     options={"dim": 16, "depth": 1, "heads": 2}, flip=False)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(40):
        place = tmp_path / "pictures" / ("a", "b/c")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.tile(np.linspace(0, 255, 24)[:, None, None], (1, 24, 3)) * generator.random(3)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def test_pictures_of_any_depth(folder, tmp_path):
    found = open_pictures(folder)
    assert len(found.split) == 40 and any("broken.png" in note for note in found.notes)
    with pytest.raises(SaccadeError, match="broken.png"):
        open_pictures(folder, strict=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaccadeError, match="no pictures"):
        open_pictures(tmp_path / "empty")
    assert len(open_pictures("digits").split) == len(open_images("digits").train)


def test_killed_and_left_alone_end_with_the_same_bits(folder, tmp_path, monkeypatch):
    pictures = open_pictures(folder)
    curves = pretrain(pictures, "deit_nano", RECIPE, tmp_path / "alone")
    assert set(curves) == {"epoch", "loss", "spread", "rank"} and curves["loss"][1] < curves["loss"][0]
    assert min(curves["spread"]) > 0 and min(curves["rank"]) >= 1

    def killed(epoch, step, steps, loss):
        if (epoch, step) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(pictures, "deit_nano", RECIPE, tmp_path / "killed", say=killed)
    assert (tmp_path / "killed" / "last.ckpt").exists()
    assert pretrain(pictures, "deit_nano", RECIPE, tmp_path / "killed")["loss"] == curves["loss"]
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("alone", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any(key.startswith(("head", "decoder")) for key in one)


def test_the_result_is_an_ordinary_checkpoint(folder, tmp_path):
    pretrain(open_pictures(folder), "deit_nano", RECIPE, tmp_path / "run")
    weights = tmp_path / "run" / "weights.safetensors"
    model = create_model("deit_nano", checkpoint_path=weights, fresh=("head*",), num_classes=5, img_size=16)
    encoder = open_encoder(tmp_path / "run")
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(model.eval().forward_features(image), encoder.model.forward_features(image))
    assert opened(weights, "deit_nano", 16).img_size == 16
    with pytest.raises(SaccadeError, match="say of which --model"):
        opened(weights)
    with pytest.raises(SaccadeError, match="holds no finished"):
        open_encoder(folder)


def test_average_accumulation_and_half_precision(folder, tmp_path):
    pictures = open_pictures(folder)
    plain = pretrain(pictures, "deit_nano", RECIPE, tmp_path / "plain")
    for name, changes in {"average": {"average": 0.5}, "accumulate": {"accumulate": 2},
                          "precision": {"precision": "bf16-mixed"}}.items():
        recipe = Pretraining(**{**vars(RECIPE), **changes})
        curves = pretrain(pictures, "deit_nano", recipe, tmp_path / name)
        assert curves["loss"][0] == pytest.approx(plain["loss"][0], rel=0.05)
        other = load_file(tmp_path / name / "weights.safetensors")
        own = load_file(tmp_path / "plain" / "weights.safetensors")
        assert any(not torch.equal(own[key], other[key]) for key in own), name
    for wrong in ({"accumulate": 0}, {"average": 1.0}, {"precision": "8"}):
        with pytest.raises(SaccadeError, match=next(iter(wrong))):
            Schedule(**wrong)


def test_accumulated_batches_are_one_large_batch(folder, tmp_path):
    """Two batches of 8 make the step of one of 16: rotation prediction draws nothing at random."""
    found = []
    for name, batch, accumulate in (("one", 16, 1), ("two", 8, 2)):
        recipe = Pretraining(epochs=1, batch_size=batch, accumulate=accumulate, img_size=16, method="rotnet",
                             flip=False)
        pretrain(open_pictures(folder), "deit_nano", recipe, tmp_path / name)
        found.append(load_file(tmp_path / name / "weights.safetensors"))
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], atol=2e-4, rtol=1e-3)


def test_a_loss_that_is_not_finite_stops(folder, tmp_path):
    recipe = Pretraining(**{**vars(RECIPE), "learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(SaccadeError, match=r"at epoch \d, step \d: lower the learning rate"):
        pretrain(open_pictures(folder), "deit_nano", recipe, tmp_path / "run")


def test_views():
    crop = views(8, 3, flip=True)
    torch.manual_seed(0)
    found = crop(torch.arange(3 * 12 * 12, dtype=torch.uint8).view(3, 12, 12))
    assert found.shape == (3, 3, 8, 8) and found.dtype == torch.uint8 and not torch.equal(found[0], found[1])
    assert views(8, 1, flip=False)(torch.zeros(3, 12, 12, dtype=torch.uint8)).shape == (3, 8, 8)


@pytest.mark.parametrize("command, curve", [
    (["pretrain", "--method", "rotnet", "--no-flip"], "loss"), (["train"], "train_loss")])
def test_two_processes_see_what_one_sees(command, curve, tmp_path):
    """The same global batch on two processes (gloo): the losses of each epoch are those of one process."""
    losses = {}
    for devices in (1, 2):
        out = tmp_path / str(devices)
        arguments = [command[0], "digits", *command[1:], "--model", "deit_nano", "--img-size", "16", "--batch-size",
                     "256", "--epochs", "2", "--out", str(out), "--devices", str(devices)]
        done = subprocess.run([sys.executable, "-m", "saccade.cli", *arguments], capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        losses[devices] = json.loads((out / "curves.json").read_text())["curves"][curve]
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)


def test_commands(folder, tmp_path, capsys):
    arguments = ["--model", "deit_nano", "--method", "mae:dim=16,depth=1,heads=2", "--epochs", "1", "--img-size", "16",
                 "--batch-size", "128", "--no-flip", "--out", str(tmp_path / "run")]
    code, out, _ = run(capsys, "pretrain", "digits", *arguments)
    assert code == 0 and "effective rank" in out
    code, out, _ = run(capsys, "probe", "digits", "--checkpoint", str(tmp_path / "run"), "--pooling",
                       "linear,attention", "--json")
    assert code == 0 and set(json.loads(out)) == {"linear", "attention"} and min(json.loads(out).values()) > 0.3
    for wrong, message in ((["--method", "mea"], "did you mean"), (["--method", "spark"], "pyramid"),
                           (["--model", "deit_nan"], "did you mean"), (["--devices", "0"], "devices=0")):
        where = tmp_path / "wrong"
        code, _, errors = run(capsys, "pretrain", "digits", *arguments[:-1], str(where), *wrong)
        assert code == 2 and message in errors and not where.exists(), errors
    code, _, errors = run(capsys, "probe", "digits", "--checkpoint", str(tmp_path / "run"), "--pooling", "liner")
    assert code == 2 and "there is no probe 'liner'" in errors


def test_a_batch_that_processes_cannot_share(monkeypatch, tmp_path):
    class Two:
        world_size, global_rank = 2, 0

    with pytest.raises(SaccadeError, match="cannot be shared by 2 processes"):
        epochs.train_epochs(Two(), torch.nn.Linear(1, 1), None, Schedule(batch_size=3), tmp_path / "x", loss_of=None,
                            curves={}, after_epoch=None)
