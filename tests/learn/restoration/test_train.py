"""Degradations, patches and training: what each does, and that a run depends on its recipe alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from saccade import SaccadeError
from saccade.learn.restoration.degradations import Haze, Jpeg, Noise, Rain, Smaller, degradation
from saccade.learn.restoration.losses import charbonnier, frequency, weighted
from saccade.learn.restoration.patches import Patches, pairs_in, pictures_in
from saccade.learn.restoration.pictures import Picture, write_picture
from saccade.learn.restoration.tiling import Bicubic
from saccade.learn.restoration.train import Recipe, fit, measured
from saccade.ops.resize import resize


def pictures(count: int = 3, side: int = 96) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (side // 8, side // 8 + k, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            for k in range(count)]


class Narrow(nn.Module):
    """Bicubic and what one hidden convolution adds."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale, self.in_chans = scale, 3
        self.base = Bicubic(scale)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.1),
                                  nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, image):
        larger = self.base(image)
        return larger + self.body(larger)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["x2", "x3", "x4", "noise25", "noise0-50", "jpeg40", "jpeg10-90", "rain", "haze"])
def test_each_degradation_follows_its_generator(name):
    how = degradation(name)
    clean = torch.rand(3, 48, 60, generator=generator(1))
    first = how(clean, generator(5))
    assert first.shape == (3, 48 // how.scale, 60 // how.scale) and first.dtype == clean.dtype
    torch.testing.assert_close(first, how(clean, generator(5)), rtol=0, atol=0)
    if name not in ("x2", "x3", "x4", "jpeg40"):
        assert not torch.equal(first, how(clean, generator(6)))
    if not name.startswith("noise"):
        torch.testing.assert_close(first * 255, (first * 255).round())
        assert 0 <= first.min() and first.max() <= 1
    assert how.scale > 1 or (first - clean).abs().mean() > 0.01


def test_what_degradations_do():
    clean = torch.full((3, 200, 200), 0.5)
    assert (Noise(25, 25)(clean, generator()) - clean).std() == pytest.approx(25 / 255, rel=0.02)
    torch.testing.assert_close(Smaller(4)(clean, generator()), torch.full((3, 50, 50), 128 / 255))
    rain = Rain()(clean, generator()) - Smaller(1)(clean, generator())
    assert rain.min() >= 0 and 0.01 < (rain > 0.1).float().mean() < 0.5
    # along a streak brightness goes on, across it does not: the columns agree more with those above than beside
    assert torch.diff(rain, dim=1).abs().mean() < torch.diff(rain, dim=2).abs().mean()
    haze = Haze()(torch.rand(3, 200, 200), generator())
    assert haze[:, :50].std() < haze[:, 150:].std() and haze[:, :50].mean() > haze[:, 150:].mean()
    rough = torch.rand(3, 64, 64, generator=generator())
    errors = [(Jpeg(q, q)(rough, generator()) - rough).abs().mean() for q in (10, 50, 95)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_an_unknown_degradation():
    with pytest.raises(SaccadeError, match="no degradation 'snow'; there are x2, x3, x4"):
        degradation("snow")


@pytest.mark.parametrize("scale", [2, 3])
def test_patches_are_cut_from_the_whole_degraded_picture(scale):
    """Degraded with its margin, a patch is what it would be if the whole picture had been degraded first."""
    image = pictures(1, 192)[0]
    made = Patches([image], Smaller(scale), seed=1)
    whole = resize(torch.from_numpy(image).movedim(-1, 0)[None].double() / 255, 1 / scale)[0]
    whole = (whole.clamp(0, 1) * 255).round().float() / 255
    places = {}
    for number in range(20):
        degraded, clean = made[number, 12]
        assert degraded.shape == (3, 12, 12) and clean.shape == (3, 12 * scale, 12 * scale)
        upright = [torch.rot90(degraded, -turns, (1, 2)) for turns in range(4)]
        upright += [one.flip(-1) for one in upright]
        windows = whole.unfold(1, 12, 1).unfold(2, 12, 1)  # (3, rows, columns, 12, 12)
        best = min((windows - one[:, None, None]).abs().amax((0, 3, 4)).min() for one in upright)
        places[number] = float(best)
    assert max(places.values()) < 1e-6


def test_patches_depend_on_seed_and_number_alone():
    first, second, other = (Patches(pictures(), Noise(25, 25), seed=seed) for seed in (0, 0, 1))
    second[5, 16]
    torch.testing.assert_close(first[7, 16], second[7, 16], rtol=0, atol=0)
    assert not torch.equal(first[7, 16][0], other[7, 16][0])
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_paired_folders(tmp_path):
    for number, image in enumerate(pictures()):
        (tmp_path / "clean").mkdir(exist_ok=True)
        (tmp_path / "small").mkdir(exist_ok=True)
        write_picture(tmp_path / "clean" / f"{number}.png", Picture(image))
        write_picture(tmp_path / "small" / f"{number}.tif", Picture(np.ascontiguousarray(image[::2, ::2])))
    clean, small = pairs_in(tmp_path / "clean", tmp_path / "small")
    made = Patches(clean, small, scale=2)
    for number in range(10):
        degraded, truth = made[number, 16]
        torch.testing.assert_close(degraded.repeat_interleave(2, 1).repeat_interleave(2, 2), truth)
    with pytest.raises(SaccadeError, match="are not 3 times"):
        Patches(clean, small, scale=3)[0, 8]
    (tmp_path / "small" / "0.tif").unlink()
    with pytest.raises(SaccadeError, match="no partner of the same name"):
        pairs_in(tmp_path / "clean", tmp_path / "small")
    assert len(pictures_in(tmp_path)) == 5
    with pytest.raises(SaccadeError, match="too few for patches of 256"):
        Patches(clean, Smaller(2))[0, 128]


def test_losses():
    made, truth = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert charbonnier(made, made) == pytest.approx(1e-3)
    torch.testing.assert_close(charbonnier(made, truth), (made - truth).abs().mean(), rtol=1e-2, atol=0)
    spectrum = torch.fft.rfft2(made - truth) / 8
    torch.testing.assert_close(frequency(made, truth), (spectrum.real.abs() + spectrum.imag.abs()).mean() / 2)
    torch.testing.assert_close(weighted({"l1": 2.0, "fft": 0.5})(made, truth),
                               2 * (made - truth).abs().mean() + 0.5 * frequency(made, truth))
    with pytest.raises(SaccadeError, match="loss huber: choose of l1, charbonnier, fft"):
        weighted({"huber": 1.0})


RECIPE = Recipe(epochs=3, steps=4, batch_size=4, patches=(12, 24), learning_rate=3e-3,
                losses={"charbonnier": 1.0, "fft": 0.1})


def held(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = []
    for image in pictures(count, 64):
        clean = torch.from_numpy(np.ascontiguousarray(image[:64, :64])).movedim(-1, 0)[None].float() / 255
        made.append((Smaller(2)(clean[0], generator())[None], clean))
    return made


def test_patches_grow_and_batches_shrink():
    recipe = Recipe(epochs=5, batch_size=8, patches=(24, 48))
    assert [(recipe.patch_at(epoch), recipe.batch_at(epoch)) for epoch in range(5)] == [(24, 8)] * 3 + [(48, 2)] * 2
    assert Recipe(epochs=2, batch_size=4, patches=(24, 96)).batch_at(1) == 1
    for wrong, told in {"patches are": dict(patches=()), "at most one for each": dict(epochs=1, patches=(8, 16)),
                        "average is 1": dict(average=1), "loss huber": dict(losses={"huber": 1}),
                        "steps is 0": dict(steps=0)}.items():
        with pytest.raises(SaccadeError, match=wrong):
            Recipe(**told)


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path):
    made, seen = Patches(pictures(), Smaller(2)), []

    def stop(now):
        seen.append((now.epoch, now.step, now.steps))
        if (now.epoch, now.step) == (2, 3):
            raise KeyboardInterrupt

    whole = fit(Narrow, made, RECIPE, tmp_path / "whole", held=held())
    with pytest.raises(KeyboardInterrupt):
        fit(Narrow, made, RECIPE, tmp_path / "stopped", held=held(), progress=stop)
    assert seen == [(1, step, 4) for step in range(1, 5)] + [(2, step, 4) for step in range(1, 4)]
    again = fit(Narrow, made, RECIPE, tmp_path / "stopped", held=held(), progress=lambda now: seen.append(now.epoch))
    assert seen[7:] == [2] * 4 + [3] * 4 and again.curves == whole.curves
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    fit(Narrow, made, RECIPE, tmp_path / "whole", progress=lambda step: pytest.fail("a finished run is read"))
    with pytest.raises(SaccadeError, match="holds another run: learning_rate"):
        fit(Narrow, made, replace(RECIPE, learning_rate=1e-4), tmp_path / "whole")


def test_training_learns_and_starts_from_weights(tmp_path):
    made, recipe = Patches(pictures(), Smaller(2)), Recipe(epochs=4, steps=20, batch_size=4, patches=(16,),
                                                           learning_rate=3e-3)
    first = fit(Narrow, made, recipe, tmp_path / "first", held=held())
    assert first.curves["train_loss"][-1] < 0.8 * first.curves["train_loss"][0]
    expected = measured(first.model, held(), 2)
    assert {name: first.curves[f"val_{name}"][-1] for name in expected} == pytest.approx(expected)
    assert first.curves["val_psnr_y"][-1] > first.curves["val_psnr_y"][0]

    def loaded():
        model = Narrow()
        model.load_state_dict(load_file(tmp_path / "first" / "weights.safetensors"))
        return model

    again = fit(loaded, made, replace(recipe, epochs=1, learning_rate=1e-6), tmp_path / "second")
    assert again.curves["train_loss"][0] < 0.8 * first.curves["train_loss"][0]


def test_the_result_is_the_moving_average(tmp_path):
    """With 0 it is the last step's weights, early in a run it follows the faster the fewer steps were done."""
    made, weights = Patches(pictures(), Smaller(2)), []

    class Watched(Narrow):
        def forward(self, image):
            if self.training:
                weights.append(self.body[0].weight.detach().clone())
            return super().forward(image)

    recipe = Recipe(epochs=1, steps=4, batch_size=2, patches=(12,), learning_rate=1e-2, warmup=0)
    live = fit(Watched, made, replace(recipe, average=0.0), tmp_path / "live").model.body[0].weight
    states = [*weights[1:4], live]  # after each step
    kept = fit(Watched, made, recipe, tmp_path / "kept").model.body[0].weight
    expected = weights[0]
    for step, state in enumerate(states, 1):
        share = step / (9 + step)
        expected = share * expected + (1 - share) * state
    torch.testing.assert_close(kept, expected)


def test_stages_are_supervised_at_each_scale(tmp_path):
    class Staged(nn.Module):
        scale, in_chans = 1, 3

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2, 2))

        def stages(self, image):
            return [[image[..., ::2, ::2] * 0 + self.bias[stage, 0], image * 0 + self.bias[stage, 1]]
                    for stage in range(2)]

        def forward(self, image):
            return self.stages(image)[-1][-1]

    white = Patches([np.full((32, 32, 3), 255, np.uint8)], Noise(0, 0))
    recipe = Recipe(epochs=1, steps=1, batch_size=1, patches=(8,), average=0.0, warmup=0)
    found = fit(Staged, white, recipe, tmp_path)
    assert found.curves["train_loss"] == [4.0]  # of two stages at two scales
    assert (found.model.bias > 0).all()


def test_pictures_that_are_decoded_at_each_use_give_the_same_bits(tmp_path):
    for number, image in enumerate(pictures()):
        write_picture(tmp_path / f"{number}.png", Picture(image))
    files = pictures_in(tmp_path)
    kept, each = Patches(files, Smaller(2), pixels=1), Patches(files, Smaller(2))
    assert kept.kept is not None and each.kept is None
    assert kept.fingerprint == each.fingerprint
    first, second = (fit(Narrow, made, RECIPE, tmp_path / f"run{number}") for number, made in enumerate((kept, each)))
    assert first.curves == second.curves


def test_what_does_not_fit_is_told(tmp_path):
    with pytest.raises(SaccadeError, match="patches of scale 4 .* network of scale 2"):
        fit(Narrow, Patches(pictures(), Smaller(4)), RECIPE, tmp_path / "a")
    with pytest.raises(SaccadeError, match="loss became .* lower the learning rate"):
        fit(Narrow, Patches(pictures(), Smaller(2)), Recipe(epochs=1, steps=50, batch_size=2, patches=(12,),
                                                            learning_rate=1e30, clip=1e30), tmp_path / "b")
