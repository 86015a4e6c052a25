"""Relevance: what each rule keeps, in chains, sums and attention; saliency of a picture: nothing, and a blob."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.attribution.explanation import explain
from saccade.papers.salient_relevance import context_saliency, lab
from saccade.parts.relevance import RULES, relevance
from tests.contracts.registered import randomised


def without_bias(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "position" in name or "prefix" in name:
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "alpha_beta"])
def test_relevance_is_kept_in_a_chain(rule):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.MaxPool2d(3, 1), nn.AvgPool2d(2), nn.Conv2d(8, 6, 3, bias=False),
        nn.GELU(), nn.Flatten(), nn.Linear(6, 4, bias=False),
    ).double().eval()
    x, target = torch.randn(5, 3, 10, 10, dtype=torch.float64), torch.arange(5) % 4
    score = model(x).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(relevance(model, x, target, rule).sum((1, 2, 3)), score, rtol=1e-4, atol=1e-6)


def test_positive_weights_keep_what_is_positive():
    torch.manual_seed(0)
    model = nn.Linear(12, 3, bias=False).double()
    with torch.no_grad():
        model.weight.abs_()
    chain, x = nn.Sequential(nn.Flatten(), model), torch.rand(2, 3, 2, 2, dtype=torch.float64)
    target = torch.tensor([0, 2])
    for rule in ("z_plus", "mixed"):
        found = relevance(chain, x, target, rule)
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum((1, 2, 3)), chain(x).gather(1, target[:, None])[:, 0])


@pytest.mark.parametrize("host", ["deit_nano", "swin_nano", "convnext_nano", "resnet18"])
def test_relevance_is_kept_in_networks_without_biases(host):
    """Residual sums, norms, attention and its position bias, layer scale: only biases take relevance away."""
    torch.manual_seed(0)
    model = without_bias(randomised(create_model(host, num_classes=3))).double().eval()
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.zero_()
    x, target = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2])
    with torch.no_grad():
        score = model(x).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(relevance(model, x, target).sum((1, 2, 3)), score, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("product", [torch.mul, lambda a, b: torch.addcmul(torch.zeros(()), a, b)])
def test_products_share(product):
    class Gated(nn.Module):
        def forward(self, image):
            x = image.flatten(1)
            return product(x[:, :6], x[:, 6:])[:, :2]

    x = torch.randn(1, 3, 2, 2)
    found = relevance(Gated(), x, torch.tensor([1]))[0].flatten()
    torch.testing.assert_close(found[1], found[7])
    torch.testing.assert_close(found.sum(), Gated()(x)[0, 1])


def test_other_scores_do_not_matter_and_rules_differ():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    x, target = torch.randn(1, 3, 8, 8), torch.tensor([1])
    maps = {rule: relevance(model, x, target, rule) for rule in RULES}
    with torch.no_grad():
        model[3].bias[0] += 5
    torch.testing.assert_close(relevance(model, x, target), maps["epsilon"])
    assert not torch.allclose(maps["gamma"], maps["alpha_beta"])
    with pytest.raises(SaccadeError, match="choose from epsilon"):
        relevance(model, x, target, "delta")


def test_a_blob_stands_out_and_nothing_does_not():
    flat = torch.full((1, 3, 60, 80), 0.3)
    assert context_saliency(flat).abs().max() < 1e-6
    blob = flat.clone()
    blob[:, 0, 20:32, 50:62] = 1
    found = context_saliency(blob)[0]
    row, column = divmod(int(found.argmax()), 80)
    assert 16 <= row < 36 and 46 <= column < 66 and 0 <= found.min() and found.max() < 1
    assert found[26, 56] > 5 * found[50, 10]
    assert context_saliency(torch.rand(2, 3, 300, 20)).shape == (2, 300, 20)
    with pytest.raises(SaccadeError, match="colours"):
        context_saliency(torch.rand(1, 1, 9, 9))


def test_lab_is_scikit_images():
    color = pytest.importorskip("skimage.color")
    picture = torch.rand(1, 3, 5, 7, dtype=torch.float64)
    wanted = torch.from_numpy(color.rgb2lab(picture[0].permute(1, 2, 0).numpy())).permute(2, 0, 1)
    spread, start = (torch.tensor(each).view(3, 1, 1) for each in ([100.0, 255.0, 255.0], [0.0, 128.0, 128.0]))
    found = lab(picture)[0] * spread - start
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.02)


def test_explained():
    torch.manual_seed(0)
    model = create_model("convnext_nano", num_classes=3)
    found = explain(model, torch.randn(2, 3, 32, 32), "salient_relevance")
    assert found.maps.shape == (2, 32, 32) and found.maps.min() >= 0 and found.maps.max() < 1 and not found.signed
