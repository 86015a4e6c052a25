"""Sensitivity maps have known values for linear models and leave the model as found; pictures come out as described."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from saccade.attribution.maps import as_data_uri, overlay, sensitivity
from saccade.core.errors import SaccadeError

SIDE = 12


class Linear(nn.Module):
    """scores = weight @ flattened image: its slope is its weight, wherever it is asked."""

    def __init__(self, classes: int = 3, side: int = SIDE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(classes, 3, side, side, generator=generator))

    def forward(self, image: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", image, self.weight)


def picture(side: int = SIDE) -> Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(2))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, 5)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("target", [0, 2])
def test_linear_model_answers_with_its_weight(target: int) -> None:
    model = Linear()
    expected = model.weight[target].detach().abs().sum(dim=0)
    assert_close(sensitivity(model, picture(), target), expected / expected.max())


def test_one_seeing_pixel_becomes_a_gaussian_around_it() -> None:
    model = Linear(side=100)  # one hundredth of the longer side: a deviation of one pixel
    with torch.no_grad():
        model.weight.zero_()[1, :, 50, 30] = -2.0
    heat = sensitivity(model, picture(100), target=1)
    assert heat[50, 30] == 1
    for row, column in ((50, 31), (51, 30), (49, 29), (48, 32)):
        distance = (row - 50) ** 2 + (column - 30) ** 2
        assert_close(heat[row, column], torch.tensor(-distance / 2).exp())
    assert heat[50, 34] == 0 and sensitivity(model, picture(100), target=0).abs().max() == 0


def test_slopes_of_opposite_sign_do_not_cancel() -> None:
    class Even(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.square().sum(dim=(1, 2, 3))[:, None]

    image = torch.zeros(3, 4, 4)
    image[:, 0, 0], image[:, 1, 1] = 5.0, -5.0
    heat = sensitivity(Even(), image, 0, samples=1, noise=0.0)
    assert_close(heat, image.abs().sum(0) / 15)
    noisy = sensitivity(Even(), image, 0, samples=64, noise=0.1)
    assert noisy[3, 3] > 0.02  # the mean of |2 e| is positive, though the mean of 2 e is about 0


def test_model_is_left_as_found() -> None:
    model = network().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        sensitivity(model, picture(), 4)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] + [True] * 5
    for number, parameter in enumerate(model.parameters()):
        assert (parameter.grad is None) if number % 2 == 0 else bool((parameter.grad == number).all())
    for name, value in model.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_flags_return_even_when_the_model_breaks() -> None:
    model = network().train()
    with pytest.raises(RuntimeError):
        sensitivity(model, torch.zeros(7, SIDE, SIDE), 0)
    assert all(module.training for module in model.modules())


def test_same_call_same_map_and_the_seed_counts() -> None:
    model, image = network(), picture()
    first = sensitivity(model, image, 1)
    torch.manual_seed(77)
    assert torch.equal(first, sensitivity(model, image, 1))
    assert not torch.equal(first, sensitivity(model, image, 1, seed=1))
    assert first.shape == (SIDE, SIDE) and first.min() >= 0 and first.max() == 1


def test_inference_mode_and_float64() -> None:
    model = network().double()
    with torch.inference_mode():
        heat = sensitivity(model, picture().double(), 0)
    assert heat.dtype == torch.float64
    assert_close(heat, sensitivity(model, picture().double(), 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sensitivity(Linear(), torch.zeros(1, 3, SIDE, SIDE), 0), r"\(1, 3, 12, 12\).*one picture"),
        (lambda: sensitivity(Linear(), picture(), 3), r"target is 3.*0 to 2"),
        (lambda: sensitivity(Linear(), picture(), -1), r"target is -1"),
        (lambda: sensitivity(Linear(), picture(), 0, samples=0), r"samples is 0"),
        (lambda: sensitivity(nn.Identity(), picture(), 0), r"\(8, 3, 12, 12\).*classes"),
        (lambda: sensitivity(Detached(), picture(), 0), r"no gradient"),
        (lambda: overlay(Image.new("RGB", (4, 4)), torch.zeros(1, 4, 4), 8), r"\(1, 4, 4\).*one map"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        call()


class Detached(Linear):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).detach()


def test_overlay_keeps_the_aspect_ratio_and_crisp_pixels() -> None:
    small = Image.new("RGB", (4, 2), "black")
    small.putpixel((3, 0), (255, 255, 255))
    cold = overlay(small, torch.zeros(2, 4), 80)
    assert cold.size == (80, 40) and cold.mode == "RGB"
    # Zero heat covers 30 % with the lowest colour, (0, 0, 4); no blur at the edge of an enlarged pixel.
    assert cold.getpixel((59, 19)) == (0, 0, 1) and cold.getpixel((60, 19)) == (178, 178, 180)
    assert cold.getpixel((79, 0)) == (178, 178, 180) and cold.getpixel((79, 20)) == (0, 0, 1)


def test_overlay_glows_where_the_heat_is() -> None:
    heat = torch.zeros(8, 8)
    heat[:, 6:] = 1
    laid = overlay(Image.new("L", (8, 8), 128), heat, 8)
    assert laid.getpixel((7, 3)) == tuple(round(0.1 * 128 + 0.9 * value) for value in (252, 255, 164))
    assert laid.getpixel((0, 3)) == (90, 90, 91)


def test_data_uri_holds_the_same_pixels() -> None:
    image = overlay(Image.new("RGB", (5, 3), "teal"), torch.rand(3, 5), 10)
    head, _, body = as_data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).tobytes() == image.tobytes()
