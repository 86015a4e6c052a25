"""The linear system of a network at a picture: by hand, replayed, transposed, as votes; refused where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade import SaccadeError, create_model
from saccade.attribution.explanation import explain
from saccade.papers.ibn_net import InstanceNorm
from saccade.papers.linearscope import LinearSystem
from tests.attribution.planted import auc, pictures, trained

PIECEWISE = ["resnet18", "rotnet_nin3", "mobilenet_v1_nano", "mobilenet_v2_nano", "tvconv_nano"]


def spread(name):
    """A model whose norms have seen pictures, so that scales, shifts and scores are of every size."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_two_layers_by_hand():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2)), draw(1, 3, 2, 2)
    first, second = model[1], model[3]
    on = (first(x.flatten(1)) > 0).float()
    weight, bias = second.weight * on @ first.weight, second.weight @ (on[0] * first.bias) + second.bias
    system = LinearSystem(model, x)
    assert system.piecewise_linear
    assert_close(system.bias[0], bias)
    for row in range(2):
        assert_close(system.transposed(torch.eye(2)[row:row + 1]).flatten(), weight[row])
    assert_close(system.apply(torch.eye(12)[5].view(1, 3, 2, 2))[0], weight[:, 5])


@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_linear_models_are_their_systems(name):
    model, x = spread(name), draw(2, 3, 32, 32)
    system, output = LinearSystem(model, x), model(x).detach()
    assert system.piecewise_linear == (name != "tvconv_nano")  # a norm helps to make its weights
    scale = float(output.abs().amax())
    assert_close(system.forward(x).detach(), output, rtol=1e-4, atol=1e-4 * scale)
    assert_close(system.apply(x) + system.bias, output, rtol=1e-4, atol=1e-4 * scale)
    probe, back = draw(2, 3, 32, 32, seed=1), draw(*output.shape, seed=2)
    forth = system.apply(probe)
    assert_close((forth * back).sum(), (probe * system.transposed(back)).sum(), rtol=1e-3, atol=1e-3 * scale)
    assert_close(system.apply(-3 * probe), -3 * forth, rtol=1e-3, atol=1e-3 * scale)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(model(leaf), leaf, back)[0]
    assert_close(system.transposed(back), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().amax()))
    target = torch.tensor([1, 3])
    votes = explain(model, x, "linearscope", target)
    rows = torch.arange(2)
    assert votes.signed
    assert_close(votes.maps.sum((1, 2)) + system.bias[rows, target], output[rows, target], rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("hold", ["gain", "slope"])
def test_smooth_calls_and_norms_are_held(hold):
    torch.manual_seed(0)
    norms = nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.GELU(), norms[1], nn.MaxPool2d(2), nn.Flatten(),
                          nn.LayerNorm(72), nn.SiLU(), nn.Linear(72, 3)).eval()
    x = draw(2, 3, 8, 8)
    system = LinearSystem(model, x, hold)
    assert not system.piecewise_linear
    assert_close(system.forward(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ibn_b_nano", "densenet_ibn_nano"])
def test_norms_that_are_written_out_are_held_as_torchs_are(name):
    """IBN-Net's instance norm is no call of torch's, yet its statistics are decisions too."""
    model, x = spread(name), draw(2, 3, 32, 32)
    system, output = LinearSystem(model, x), model(x).detach()
    assert not system.piecewise_linear
    scale = float(output.abs().amax())
    assert_close(system.forward(x).detach(), output, rtol=1e-4, atol=1e-4 * scale)
    ours, theirs = InstanceNorm(3), nn.InstanceNorm2d(3, affine=True)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    last = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    held = [LinearSystem(norm, x) for norm in (nn.Sequential(ToTokens(ours), last), nn.Sequential(theirs, last))]
    probe = draw(2, 3, 32, 32, seed=1)
    assert_close(held[0].apply(probe), held[1].apply(probe), rtol=1e-4, atol=1e-5)
    assert_close(held[0].bias, held[1].bias, rtol=1e-4, atol=1e-5)


class ToTokens(nn.Module):
    """A norm of (B, *grid, C) on a map (B, C, H, W)."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def test_a_gain_has_no_bias_and_a_slope_has():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(288, 2, bias=False))
    x = draw(1, 3, 8, 8)
    assert LinearSystem(model, x, "gain").bias.abs().max() < 1e-6
    assert LinearSystem(model, x, "slope").bias.abs().max() > 1e-3


def test_votes_find_the_planted_patch():
    x, label, where = pictures(8, seed=0)
    assert auc(explain(trained("cnn"), x, "linearscope", label).maps, where) > 0.85


@pytest.mark.parametrize("name", ["deit_nano", "cvt_nano", "dhvt_nano", "affnet_nano", "ibn_a_nano", "hornet_nano",
                                  "focalnet_nano", "attnet_nano", "awb_post_nano"])
def test_products_of_activations_are_refused(name):
    torch.manual_seed(0)
    with pytest.raises(SaccadeError, match="no linear system"):
        LinearSystem(create_model(name, num_classes=2).eval(), draw(1, 3, 32, 32))


def test_errors_say_what_to_do():
    with pytest.raises(SaccadeError, match='choose "gain" or "slope"'):
        LinearSystem(nn.Flatten(), draw(1, 3, 2, 2), "taylor")
