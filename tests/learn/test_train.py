"""A run's bits depend on its recipe alone: killed and resumed, they are those of an undisturbed run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from saccade.core.errors import SaccadeError
from saccade.learn import loop, transforms
from saccade.learn.loop import Progress
from saccade.learn.train import Recipe, fit, predict_logits
from saccade.learn.transforms import Squares, evaluation_transform, normalise, training_transform


class Stripes(torch.utils.data.Dataset):
    """Class 0: horizontal stripes, class 1: vertical, class 2: none; noise on all."""

    def __init__(self, count: int, seed: int, size: tuple[int, int] = (10, 12)) -> None:
        random = np.random.default_rng(seed)
        self.labels = [i % 3 for i in range(count)]
        self.paths = [f"{i}.png" for i in range(count)]
        self.pictures = []
        for label in self.labels:
            wave = np.arange(size[label % 2])[:, None] % 4 < 2
            stripes = np.broadcast_to(wave if label == 0 else wave.T, size) if label < 2 else np.full(size, 0.5)
            pixels = 60 + 120 * stripes[..., None] + random.normal(0, 20, (*size, 3))
            self.pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.pictures[i], self.labels[i]


class Tiny(nn.Module):
    """All that can break a resume: batch statistics, dropout, an indexed table, a parameter that must not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.table = nn.Parameter(torch.zeros(5, 8))
        self.head = nn.Linear(8, 3)

    def no_weight_decay(self) -> set[str]:
        return {"table"}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(image)).relu()
        index = torch.arange(x.shape[-1]) % 5
        x = x + self.table[index].T[:, None]
        return self.head(self.drop(x.square().mean((2, 3))))


RECIPE = Recipe(epochs=4, batch_size=16, learning_rate=0.02, img_size=8, flip=False)


@pytest.fixture(scope="module")
def images() -> SimpleNamespace:
    torch.set_num_threads(1)  # a forked child can only compute with one
    splits = {name: Stripes(count, seed) for seed, (name, count) in enumerate(dict(train=60, val=30, test=12).items())}
    return SimpleNamespace(name="stripes", classes=["-", "|", "o"], notes=[], fingerprint="stripes-1", **splits)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    steps: list[Progress] = []
    return SimpleNamespace(folder=folder, steps=steps, fitted=fit(Tiny, images, RECIPE, folder, progress=steps.append))


def assert_same(fitted, other) -> None:
    ours, theirs = fitted.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert fitted.curves == other.curves


def test_learns_and_leaves_a_finished_folder(whole, images):
    curves = whole.fitted.curves
    assert curves["epoch"] == [1, 2, 3, 4]
    assert {len(curve) for curve in curves.values()} == {4}
    assert curves["train_loss"][-1] < curves["train_loss"][0]
    assert curves["val_accuracy"][-1] > 0.6
    assert sorted(path.name for path in whole.folder.iterdir()) == ["curves.json", "recipe.json", "weights.safetensors"]
    assert load_file(whole.folder / "weights.safetensors").keys() == whole.fitted.model.state_dict().keys()
    assert not whole.fitted.model.training and whole.fitted.seconds > 0


def test_progress_counts_every_step(whole):
    assert [(at.epoch, at.step) for at in whole.steps] == [(e, s) for e in (1, 2, 3, 4) for s in (1, 2, 3)]
    assert {(at.epochs, at.steps) for at in whole.steps} == {(4, 3)}
    assert [at.val_accuracy for at in whole.steps[::3]] == [None, *whole.fitted.curves["val_accuracy"][:3]]


def test_curves_are_those_of_the_model(whole, images):
    logits = predict_logits(whole.fitted.model, images.val, img_size=8)
    truth = torch.tensor(images.val.labels)
    assert whole.fitted.curves["val_accuracy"][-1] == pytest.approx((logits.argmax(1) == truth).float().mean().item())
    assert whole.fitted.curves["val_loss"][-1] == pytest.approx(nn.functional.cross_entropy(logits, truth).item())


@pytest.mark.parametrize("epoch, step", [(1, 2), (3, 1), (4, 3)])
def test_killed_run_resumes_to_the_same_bits(whole, images, tmp_path, epoch, step):
    def die(at: Progress) -> None:
        if (at.epoch, at.step) == (epoch, step):
            os.kill(os.getpid(), signal.SIGKILL)

    context = multiprocessing.get_context("fork")
    child = context.Process(target=fit, args=(Tiny, images, RECIPE, tmp_path), kwargs={"progress": die})
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    torch.manual_seed(epoch)  # the history of the process must not matter
    steps: list[Progress] = []
    assert_same(fit(Tiny, images, RECIPE, tmp_path, progress=steps.append), whole.fitted)
    assert (steps[0].epoch, steps[0].step) == (epoch, 1)


@pytest.mark.parametrize("name", ["recipe.json", "last.ckpt", "weights.safetensors", "curves.json"])
def test_stopped_in_the_midst_of_writing(whole, images, tmp_path, monkeypatch, name):
    place = os.replace

    def stop(part, path):
        if path.name == name:
            part.write_bytes(part.read_bytes()[:10])
            raise KeyboardInterrupt
        place(part, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        fit(Tiny, images, RECIPE, tmp_path)
    assert_same(fit(Tiny, images, RECIPE, tmp_path), whole.fitted)
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "weights.safetensors", "curves.json"])
def test_a_full_disk_is_told_and_loses_nothing(whole, images, tmp_path, monkeypatch, name):
    sync, at = os.fsync, []

    def full(number):
        if name in os.readlink(f"/proc/self/fd/{number}"):
            at.append(name)
            if len(at) == (2 if name == "last.ckpt" else 1):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaccadeError, match=r"could not be written \(No space left on device\): make room"):
        fit(Tiny, images, RECIPE, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    seen = []
    assert_same(fit(Tiny, images, RECIPE, tmp_path, progress=seen.append), whole.fitted)
    assert [now.epoch for now in seen if now.step == 1] == ([2, 3, 4] if name == "last.ckpt" else [])


def test_finished_run_is_read_not_trained(whole, images):
    assert_same(fit(Tiny, images, RECIPE, whole.folder, progress=pytest.fail), whole.fitted)


def test_pictures_decoded_at_each_use_give_the_same_bits(whole, images, tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, "CACHE_BYTES", 0)
    assert_same(fit(Tiny, images, RECIPE, tmp_path), whole.fitted)


def test_same_bits_on_two_threads(images, tmp_path):
    # without deterministic algorithms two threads add its gradient in any order
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 64))
            self.head = nn.Linear(64, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            index = (image[:, 0].flatten(1) * 3).long() % 7
            return self.head(self.table[index].sin().mean(1))

    torch.set_num_threads(2)
    try:
        recipe = replace(RECIPE, epochs=1)
        assert_same(fit(Table, images, recipe, tmp_path / "a"), fit(Table, images, recipe, tmp_path / "b"))
    finally:
        torch.set_num_threads(1)


def test_other_seed_is_another_run(whole, images, tmp_path):
    other = fit(Tiny, images, replace(RECIPE, seed=1), tmp_path)
    assert not torch.equal(other.model.head.weight, whole.fitted.model.head.weight)
    with pytest.raises(SaccadeError, match=r"holds another run: learning_rate is 0\.02 there and 0\.5 here; choose"):
        fit(Tiny, images, replace(RECIPE, learning_rate=0.5), whole.folder)
    with pytest.raises(SaccadeError, match="images is stripes-1 there and stripes-2 here"):
        fit(Tiny, SimpleNamespace(**vars(images) | {"fingerprint": "stripes-2"}), RECIPE, whole.folder)
    with pytest.raises(SaccadeError, match="model is 307 parameters, .* there and 582 parameters"):
        other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 1, bias=False))
        fit(lambda: other, images, RECIPE, whole.folder)


def test_starts_from_loaded_weights(whole, images, tmp_path):
    def loaded() -> nn.Module:
        model = Tiny()
        model.load_state_dict(load_file(whole.folder / "weights.safetensors"))
        return model

    tuned = fit(loaded, images, replace(RECIPE, epochs=1, learning_rate=1e-5), tmp_path)
    assert tuned.curves["val_loss"][0] == pytest.approx(whole.fitted.curves["val_loss"][-1], rel=0.1)
    with pytest.raises(SaccadeError, match="model is"):  # same recipe, other starting weights
        fit(Tiny, images, replace(RECIPE, epochs=1, learning_rate=1e-5), tmp_path)


def test_tied_weights_are_written_under_both_names(images, tmp_path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        model[3].weight = model[2].weight
        return model

    model = fit(tied, images, replace(RECIPE, epochs=1), tmp_path).model
    assert model[3].weight is model[2].weight
    weights = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(weights["2.weight"], weights["3.weight"])


def test_loss_that_is_not_finite_names_the_place_and_the_remedy(images, tmp_path):
    class Explodes(Tiny):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image) / (0 if self.norm.num_batches_tracked == 5 else 1)

    place = r"loss became nan at epoch 2, step 2: lower the learning rate \(it is 0\.02\)"
    with pytest.raises(SaccadeError, match=place):
        fit(Explodes, images, RECIPE, tmp_path)
    with pytest.raises(SaccadeError, match=place):  # and again from the kept epoch
        fit(Explodes, images, RECIPE, tmp_path)


def test_optimizer_and_schedule(images, tmp_path, monkeypatch):
    rates, groups = [], []
    clip = loop.fabric.Fabric.clip_gradients

    def watch(self, module, optimizer, **arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        groups[:] = [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        return clip(self, module, optimizer, **arguments)

    monkeypatch.setattr(loop.fabric.Fabric, "clip_gradients", watch)
    fit(Tiny, images, RECIPE, tmp_path)
    assert sorted(groups) == [(0.0, 5), (0.05, 2)]  # biases, norm and table do not decay
    assert rates[0] == pytest.approx(0.02 / 100) and rates[3] == max(rates) == pytest.approx(0.02)
    falling = [0.01 * (1 + np.cos(np.pi * step / 9)) for step in range(9)]
    assert rates[3:] == pytest.approx(falling)


def test_each_epoch_has_an_order_of_its_own(images, tmp_path):
    seen: list[list[float]] = []

    class Watch(Tiny):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(image.sum((1, 2, 3)).tolist())
            return super().forward(image)

    fit(Watch, images, replace(RECIPE, epochs=2, batch_size=60, augment=False), tmp_path)
    assert seen[0] != seen[1] and sorted(seen[0]) == pytest.approx(sorted(seen[1]))


def test_state_of_torch_is_left_alone(images, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(Tiny, images, RECIPE, tmp_path, progress=lambda at: (_ for _ in ()).throw(KeyboardInterrupt))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_quiet(images, tmp_path, capfd, caplog, recwarn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(Tiny, images, replace(RECIPE, epochs=1), tmp_path / "run")
    assert capfd.readouterr() == ("", "") and caplog.messages == []
    assert [str(warning.message) for warning in recwarn] == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_fewer_pictures_than_a_batch(images, tmp_path):
    assert fit(Tiny, images, replace(RECIPE, epochs=1, batch_size=500), tmp_path).curves["epoch"] == [1]
    with pytest.raises(SaccadeError, match="epochs is 0: it must be above 0"):
        replace(RECIPE, epochs=0)


def test_predict_logits_is_ordered_and_does_not_depend_on_the_batch(whole, images):
    model = whole.fitted.model.train()
    logits = predict_logits(model, images.test, img_size=8, batch_size=5)
    one = normalise(evaluation_transform(8)(images.test[7][0])[None], Recipe.mean, Recipe.std)
    assert logits.shape == (12, 3) and not model.training
    torch.testing.assert_close(logits[7:8], model(one).detach())
    torch.testing.assert_close(logits, predict_logits(model, images.test, img_size=8, batch_size=12))


def test_evaluation_transform_takes_the_central_square():
    pixels = evaluation_transform(8)(Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)))
    expected = torch.arange(8 * 12 * 3).reshape(8, 12, 3)[:, 2:10].permute(2, 0, 1) % 256
    assert torch.equal(pixels.long(), expected)
    grey = normalise(torch.full((2, 3, 1, 1), 255, dtype=torch.uint8), (0.5, 0.4, 0.0), (0.5, 0.1, 1.0))
    torch.testing.assert_close(grey[1, :, 0, 0], torch.tensor([1.0, 6.0, 1.0]))


def test_augmentation_belongs_to_picture_and_epoch(images):
    squares = Squares(images.train, 8, training_transform(8, replace(RECIPE, flip=True)))
    squares.begin(0, 1)
    first = [squares[i][0] for i in (3, 4, 5)]
    state = torch.get_rng_state()
    assert torch.equal(squares[4][0], first[1])
    assert torch.equal(torch.get_rng_state(), state)
    squares.begin(0, 2)
    assert not torch.equal(squares[4][0], first[1])
    assert first[0].shape == (3, 8, 8) and first[0].dtype == torch.uint8
    assert training_transform(8, replace(RECIPE, augment=False)) is None


def test_curves_file_is_plain(whole):
    written = json.loads((whole.folder / "curves.json").read_text())
    assert written["curves"] == whole.fitted.curves and written["seconds"] == whole.fitted.seconds
