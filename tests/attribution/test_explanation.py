"""`explain`: known values, a planted patch that must be found, maps that die with the weights, errors in one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from saccade import SaccadeError, create_model
from saccade.attribution.explanation import METHODS, explain, list_explainers
from saccade.parts.tokens import token_grid
from tests.attribution.planted import auc, convolutional, pictures, trained

# The least area under the curve with which a method must find the planted patch, by model; a blind map has 0.5.
# Slopes alone are not listed for the transformers: where a patch is seen with certainty the scores are flat.
FLOORS = {
    "cnn": {"gradient": 0.85, "gradient_x_input": 0.85, "integrated_gradients": 0.85, "smoothgrad": 0.85, "lrp": 0.85,
            "gradcam": 0.95, "occlusion": 0.95, "rise": 0.85, "lime": 0.95, "meaningful_perturbation": 0.8},
    "deit_nano": {"lrp": 0.6, "integrated_gradients": 0.65, "gradcam": 0.7, "occlusion": 0.85, "lime": 0.95},
    "swin_nano": {"lrp": 0.6, "integrated_gradients": 0.8, "gradcam": 0.6, "occlusion": 0.75, "lime": 0.95},
}
# Those that any differentiable classifier can be asked; maps from attention have tests of their own.
GENERAL = [name for name, method in METHODS.items() if method.needs != "attention"]
QUICK = {"occlusion": {"patch": 8, "stride": 4}, "rise": {"masks": 300}, "lime": {"samples": 300},
         "meaningful_perturbation": {"steps": 100}}


class Weighted(nn.Module):
    """scores = weight @ flattened image + bias."""

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3, side, side, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))

    def forward(self, image: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", image, self.weight) + self.bias


def image(count: int = 2, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("model", "method"), [(model, method) for model in FLOORS for method in FLOORS[model]])
def test_planted_patch_is_found(model, method):
    x, label, where = pictures(5, seed=0)
    explanation = explain(trained(model), x, method, label, **QUICK.get(method, {}))
    assert explanation.maps.shape == where.shape
    assert auc(explanation.maps, where) > FLOORS[model][method]


@pytest.mark.parametrize("method", GENERAL)
def test_maps_change_when_the_weights_are_randomised(method):
    """Adebayo et al., Sanity Checks for Saliency Maps, 2018: a map that survives shows the picture, not the model."""
    x, label, _ = pictures(2, seed=0)
    models = [trained("cnn")]
    for seed in range(4):
        torch.manual_seed(seed)
        models.append(convolutional())
    maps = [explain(model, x, method, label, **QUICK.get(method, {})).maps.flatten(1) for model in models]
    ranks = [one.argsort(1).argsort(1).double() for one in maps]
    rank_correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for other in ranks[1:]
                         for pair in zip(ranks[0], other, strict=True)]
    assert torch.stack(rank_correlations).mean() < 0.7


def test_integrated_gradients_are_complete():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3))
    model, x = model.double(), image().double()
    found = explain(model, x, "integrated_gradients", torch.tensor([0, 2]), steps=200, baseline=0.3)
    difference = model(x) - model(torch.full_like(x, 0.3))
    assert_close(found.maps.sum((1, 2)), difference[[0, 1], [0, 2]].detach(), rtol=1e-4, atol=1e-5)
    assert found.signed and found.seconds > 0


def test_values_on_a_linear_model():
    model, x = Weighted(), image()
    target = torch.tensor([1, 2])
    weight = model.weight.detach()[target]
    assert_close(explain(model, x, "gradient", target).maps, weight.abs().sum(1))
    assert_close(explain(model, x, "smoothgrad", target).maps, weight.abs().sum(1))
    for method in ("gradient_x_input", "integrated_gradients"):
        assert_close(explain(model, x, method, target).maps, (weight * x).sum(1))
    assert_close(explain(model, x, "occlusion", target, patch=1).maps, (weight * x).sum(1), rtol=1e-3, atol=1e-4)
    cells = (weight * x).sum(1).unflatten(1, (4, 2)).unflatten(3, (4, 2)).sum((2, 4))
    lime = explain(model, x, "lime", target, samples=2000, cells=4, width=10.0).maps
    assert_close(lime[:, ::2, ::2], cells, rtol=0.02, atol=0.02)
    assert_close(lime[:, 1::2, 1::2], lime[:, ::2, ::2], rtol=0, atol=0)


def test_a_batch_is_its_pictures_and_batch_size_changes_nothing():
    model, (x, label, _) = trained("cnn"), pictures(3, seed=3)
    for method in GENERAL:
        whole = explain(model, x, method, label, **QUICK.get(method, {})).maps
        assert_close(whole[1], explain(model, x[1], method, int(label[1]), **QUICK.get(method, {})).maps[0],
                     rtol=1e-3, atol=1e-3)
    seen = []
    chunks = explain(model, x, "rise", label, masks=50, batch_size=7, progress=lambda done, of: seen.append((done, of)))
    assert_close(chunks.maps, explain(model, x, "rise", label, masks=50).maps, rtol=1e-4, atol=1e-5)
    assert seen[-1] == (150, 150) and seen == sorted(seen)


def test_the_model_is_left_as_found():
    model = create_model("deit_nano", num_classes=3).train()
    x, state = image(side=32), torch.get_rng_state()
    for method in METHODS:
        explain(model, x, method, **({"masks": 5} if method == "rise" else {"steps": 2} if "mean" in method else {}))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("host", ["resnet18", "deit_nano", "swin_nano", "pvt_v2_nano", "convnext_nano"])
def test_gradcam_finds_the_last_map_of_any_host(host):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = explain(create_model(host, num_classes=4).eval(), x, "gradcam").maps
    assert maps.shape == (1, 64, 64) and maps.min() >= 0


def test_a_hugging_face_output_is_read():
    class Hosted(Weighted):
        def forward(self, image):
            return SimpleNamespace(logits=super().forward(image))

    assert_close(explain(Hosted(), image(), "gradient", 1).maps, explain(Weighted(), image(), "gradient", 1).maps)


def test_token_grids():
    assert token_grid(197, 224, 224) == (1, (14, 14)) and token_grid(49, 224, 224) == (0, (7, 7))
    assert token_grid(2 + 15, 48, 80) == (2, (3, 5)) and token_grid(10007, 224, 224) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explain(Weighted(), image(), "gradcat"), "no attribution method 'gradcat'; did you mean gradcam"),
        (lambda: explain(Weighted(), image()[0, 0], "gradient"), r"\(8, 8\).*\(B, C, H, W\)"),
        (lambda: explain(Weighted(), image(), "gradient", 3), r"target is 3.*0 to 2"),
        (lambda: explain(Weighted(), image(), "gradient", torch.tensor([0, 1, 2])), r"one a picture \(2\)"),
        (lambda: explain(Weighted(), image(), "gradient", steps=3), "gradient: .*'steps'"),
        (lambda: explain(Weighted(), image(), "gradcam"), "the model has no map"),
        (lambda: explain(Weighted(), image(), "gradcam", layer="body"), "no module 'body'"),
        (lambda: explain(Weighted(), image(), "rise", kept=1.0), "kept=1.0"),
        (lambda: explain(nn.Identity(), image(), "rise"), "only a classifier"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(SaccadeError, match=message):
        call()


def test_the_list_holds_every_method():
    assert set(METHODS) <= set(list_explainers()) and list_explainers() == sorted(list_explainers())
