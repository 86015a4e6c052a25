"""Pre-training: resumed to the same bits, its result an ordinary checkpoint, collapse seen, views independent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from saccade import SaccadeError, create_model
from saccade.core.pretraining import pretraining
from saccade.learn.data import Split, open_pictures
from saccade.learn.features import spread
from saccade.learn.loop import Progress
from saccade.learn.pretrain import Recipe, fit, views_transform
from saccade.learn.transforms import Squares

RECIPE = Recipe(epochs=3, batch_size=8, img_size=16, average=0.5)


@pytest.fixture(scope="module")
def pictures() -> Split:
    random = np.random.default_rng(0)
    return Split([random.integers(0, 255, (16, 16)).astype(np.uint8) for _ in range(16)], [0] * 16, [""] * 16)


def rotnet() -> nn.Module:
    return pretraining(create_model("deit_nano", num_classes=0, img_size=16, drop_path_rate=0.1), "rotnet")


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(rotnet, pictures, "p", RECIPE, folder)


def test_stopped_run_resumes_to_the_same_bits(whole, pictures, tmp_path):
    def stop(at: Progress) -> None:
        if (at.epoch, at.step) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(rotnet, pictures, "p", RECIPE, tmp_path, progress=stop)
    torch.manual_seed(9)
    seen: list[Progress] = []
    again = fit(rotnet, pictures, "p", RECIPE, tmp_path, progress=seen.append)
    ours, theirs = again.model.state_dict(), whole[1].model.state_dict()
    assert seen[0].epoch == 2 and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.curves == whole[1].curves
    assert list(again.curves) == ["epoch", "train_loss", "train_accuracy", "feature_std", "effective_rank"]


def test_result_is_an_ordinary_checkpoint(whole):
    file = whole[0] / "weights.safetensors"
    model = create_model("deit_nano", num_classes=5, img_size=16, checkpoint_path=file, fresh=("head*",))
    assert torch.equal(model.state_dict()["position"], load_file(file)["position"])
    assert sorted(path.name for path in whole[0].iterdir()) == ["curves.json", "recipe.json", "weights.safetensors"]


def test_average_follows_the_model(pictures, tmp_path):
    """With a share near 1 the result is where training began; without, it is not."""
    one = replace(RECIPE, epochs=1)
    torch.manual_seed(0)
    still = fit(rotnet, pictures, "p", replace(one, average=1 - 1e-7), tmp_path / "still").model.state_dict()
    moved = fit(rotnet, pictures, "p", replace(one, average=0.0), tmp_path / "moved").model.state_dict()
    half = fit(rotnet, pictures, "p", one, tmp_path / "half").model.state_dict()
    way = [float((other["position"] - still["position"]).abs().sum()) for other in (half, moved)]
    assert 0 < way[0] < way[1]


def test_batch_in_parts_is_the_batch(pictures, tmp_path):
    one = replace(RECIPE, epochs=1, clip=1e6)
    whole, parts = (fit(rotnet_without_chance, pictures, "p", replace(one, accumulate=count), tmp_path / str(count))
                    for count in (1, 3))
    assert parts.curves["train_loss"] == pytest.approx(whole.curves["train_loss"], abs=1e-6)
    torch.testing.assert_close(parts.model.position, whole.model.position, rtol=1e-3, atol=1e-4)


def rotnet_without_chance() -> nn.Module:
    return pretraining(create_model("deit_nano", num_classes=0, img_size=16), "rotnet")


def test_bf16(pictures, tmp_path):
    found = fit(rotnet, pictures, "p", replace(RECIPE, epochs=1, precision="bf16-mixed"), tmp_path)
    assert np.isfinite(found.curves["train_loss"]).all() and found.model.position.dtype == torch.float32


def test_spread_tells_collapse():
    torch.manual_seed(0)
    point, line = torch.ones(64, 8), torch.randn(64, 1) @ torch.randn(1, 8)
    assert spread(point)["feature_std"] == 0
    assert spread(line)["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert 7.5 < spread(torch.randn(4000, 8))["effective_rank"] <= 8
    two = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert spread(two)["effective_rank"] == pytest.approx(2)


def test_loss_that_is_not_finite(pictures, tmp_path):
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = create_model("deit_nano", num_classes=0, img_size=16)
            self.steps = 0

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.model(images).mean() / (0.0 if self.steps == 3 else 1.0)}

        def after_step(self, share: float) -> None:
            self.steps += 1

    with pytest.raises(SaccadeError, match=r"loss became (nan|-?inf) at epoch 2, step 2: lower the learning rate"):
        fit(Explodes, pictures, "p", RECIPE, tmp_path)


def test_views_are_independent_crops(pictures):
    squares = Squares(pictures, 16, views_transform(16, 3, RECIPE), side=24)
    squares.begin(0, 0)
    views, _ = squares[2]
    assert views.shape == (3, 3, 16, 16) and not torch.equal(views[0], views[1])
    assert torch.equal(views, squares[2][0])
    one = Squares(pictures, 16, views_transform(16, 1, RECIPE), side=24)
    one.begin(0, 0)
    assert one[2][0].shape == (3, 16, 16)


def test_views_differ_in_colour_and_gray_stays_gray():
    torch.manual_seed(0)
    gray = torch.randint(256, (1, 24, 24), dtype=torch.uint8).expand(3, -1, -1)
    green = torch.zeros(3, 24, 24, dtype=torch.uint8)
    green[1] = 200
    draw = views_transform(16, 8, RECIPE)
    seen, coloured = draw(gray), draw(green)
    assert torch.equal(seen[:, 0], seen[:, 1]) and torch.equal(seen[:, 0], seen[:, 2])
    assert len({round(float(view.float().mean()), 1) for view in seen}) == 8
    tinted = [(view[0] != view[2]).all() for view in coloured]  # of a green whose hue is turned, red or blue gains
    assert any(tinted)


def test_shares_of_training_are_told(pictures, tmp_path):
    shares: list[float] = []

    class Told(nn.Module):
        views = 2

        def __init__(self) -> None:
            super().__init__()
            self.model = create_model("deit_nano", num_classes=0, img_size=16)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            assert images.shape == (8, 2, 3, 16, 16)
            return {"loss": (self.model(images[:, 0]) - self.model(images[:, 1])).square().mean()}

        def after_step(self, share: float) -> None:
            shares.append(share)

    fit(Told, pictures, "p", RECIPE, tmp_path)
    assert shares == pytest.approx([(step + 1) / 6 for step in range(6)])


def test_recipes_that_cannot_be():
    for options, words in ((dict(average=1.0), "average is 1.0"), (dict(accumulate=0), "accumulate is 0"),
                           (dict(precision="16"), "32-true or bf16-mixed"), (dict(smallest_crop=0.0), "smallest_crop")):
        with pytest.raises(SaccadeError, match=words):
            Recipe(**options)


def test_any_folder_gives_pictures(tmp_path):
    for place in ("a.png", "deep/er/b.png", "deep/c.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / place)
    (tmp_path / "broken.png").write_text("no picture")
    found = open_pictures(tmp_path)
    assert sorted(found.train.paths) == ["a.png", "deep/c.png", "deep/er/b.png"]
    assert any("broken.png" in note for note in found.notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaccadeError, match="no pictures in it"):
        open_pictures(tmp_path / "empty")
    assert len(open_pictures("digits").train) < 1797
