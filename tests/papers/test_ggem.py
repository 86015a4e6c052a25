"""Generalized means against their definition, their limits, and in models of every shape."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.parts.head import GeneralizedMean, pooling

X = torch.randn(2, 5, 7, 12, dtype=torch.float64)


def module(groups: int, *powers: float) -> GeneralizedMean:
    pool = GeneralizedMean(12, groups).double()
    with torch.no_grad():
        pool.power.copy_(torch.tensor(powers))
    return pool


def test_against_the_definition_in_loops():
    pool, out = module(3, 0.5, 2.0, 7.0), torch.empty(2, 12, dtype=torch.float64)
    for image in range(2):
        for channel in range(12):
            power = [0.5, 2.0, 7.0][channel // 4]
            values = [max(float(value), 1e-6) for value in X[image, :, :, channel].flatten()]
            out[image, channel] = (sum(value**power for value in values) / 35) ** (1 / power)
    torch.testing.assert_close(pool(X), out)


def test_limits():
    positive = X.abs() + 0.1
    torch.testing.assert_close(module(1, 1.0)(positive), positive.mean((1, 2)))
    torch.testing.assert_close(module(1, 2000.0)(positive), positive.amax((1, 2)), rtol=0.01, atol=0)
    torch.testing.assert_close(module(3, 2.0, 2.0, 2.0)(X), module(1, 2.0)(X))
    torch.testing.assert_close(module(1, 3.0)(4 * positive), 4 * module(1, 3.0)(positive))
    rising = torch.stack([module(1, power)(positive) for power in (0.5, 1.0, 3.0, 9.0)])
    assert (rising.diff(dim=0) > 0).all()


def test_gradients():
    pool = module(4, 0.7, 1.0, 3.0, 5.0)
    points = (X.abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: torch.func.functional_call(pool, {"power": p}, x),
                                    (points, pool.power.detach().clone().requires_grad_()))


def test_half_precision_does_not_overflow():
    pool = GeneralizedMean(12, 3, initial=16.0)
    for x in (300 * torch.randn(2, 40, 12), torch.zeros(2, 40, 12), -torch.ones(2, 40, 12)):
        out = pool(x.half())
        assert out.dtype == torch.float16 and out.isfinite().all()


HOSTS = ["deit_nano", "swin_nano", "convnext_nano", "convit_nano", "volo_nano", "cvt_nano", "crossvit_nano"]


@pytest.mark.parametrize("how", ["avg", "max", "gem", "ggem", partial(GeneralizedMean, groups=4, initial=1.0)])
@pytest.mark.parametrize("host", HOSTS)
def test_every_pooling_in_every_shape_of_model(host, how):
    model = create_model(host, num_classes=3, global_pool=how).train()
    out = model(torch.randn(2, 3, 37, 29))
    (out["scores"] if isinstance(out, dict) else out).sum().backward()
    powers = {name: value for name, value in model.named_parameters() if name.endswith("power")}
    assert all(value.grad.isfinite().all() and value.grad.any() for value in powers.values())
    assert set(powers) <= model.no_weight_decay() and bool(powers) == (how not in ("avg", "max"))
    assert create_model(host, num_classes=0, global_pool=how)(torch.randn(1, 3, 32, 32)).ndim == 2


def test_groups_are_heads():
    assert create_model("vit_base_patch16_224_ggem", num_classes=2).pool.power.shape == (12,)
    assert pooling("ggem", 320).power.shape == (5,) and pooling("gem", 320).power.shape == (1,)


def test_what_makes_no_sense_is_one_line():
    for make in (lambda: create_model("deit_nano", global_pool="mean"), lambda: GeneralizedMean(12, 5),
                 lambda: create_model("swin_nano", global_pool="token")):
        with pytest.raises(SaccadeError):
            make()
