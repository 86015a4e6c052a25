"""Every backbone and every mixer on a GPU: the numbers of the CPU, there and back. They run where there is one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from saccade import create_model
from tests.contracts.registered import MIXERS, NARROW, mixer, over, randomised

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """Convolutions round their factors to tf32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of x and of every parameter, of a fixed sum of the output."""
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view(out.shape).to(x.device)).sum().backward()
    named = {"x": x, **dict(module.named_parameters())}
    return out.detach().cpu(), {name: each.grad.cpu() for name, each in named.items() if each.grad is not None}


def near(ours: Tensor, wanted: Tensor, name: str) -> None:
    """To 1e-4 of the tensor's largest number: float64 on both, but some tables are resampled in float32."""
    scale = max(float(wanted.abs().max()), 1e-3)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4 * scale, msg=lambda text: f"{name}: {text}")


def same(module: nn.Module, x: Tensor) -> None:
    module, x = module.double(), x.double()
    there = copy.deepcopy(module).cuda()
    wanted, slopes = gradients(module, x)
    out, found = gradients(there, x.cuda())
    near(out, wanted, "output")
    assert found.keys() == slopes.keys()
    for name in slopes:
        near(found[name], slopes[name], name)


@over("test_backbones_there", NARROW)
def test_backbones_there(name):
    torch.manual_seed(0)
    model = randomised(create_model(name, num_classes=5)).eval()
    same(model, torch.randn(2, 3, 41, 29))


@over("test_mixers_there", MIXERS)
def test_mixers_there(name):
    same(mixer(name), torch.randn(2, 9, 7, 32))


@over("test_backbones_in_bfloat16", NARROW)
def test_backbones_in_bfloat16(name):
    """One training step under autocast: finite, and the evaluation near float32's."""
    torch.manual_seed(0)
    model = randomised(create_model(name, num_classes=5)).cuda()
    image = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = model.train()(image)
    out = sum(out.values()) if isinstance(out, dict) else out
    out.float().square().mean().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    with torch.no_grad():
        wanted = model.eval()(image)
        with torch.autocast("cuda", torch.bfloat16):
            found = model(image).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
