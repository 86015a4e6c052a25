"""MEDUSA by what its one body and many heads must do."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.core.record import record
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


def nano(**options):
    torch.manual_seed(0)
    return randomised(create_model("medusa_nano", num_classes=5, **options)).double().eval()


def image(*size):
    return torch.randn(1, 3, *size, dtype=torch.float64)


def test_open_gates_leave_the_plain_host():
    model, x = nano(), image(37, 50)
    for head in model.gates:
        torch.nn.init.constant_(head[-2].bias, 1e3)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), model.host.forward_features(x))
        for gated, plain in zip(model.features(x), model.host.features(x), strict=True):
            assert torch.equal(gated, plain)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_shut_gate_stops_what_follows(stage):
    """The next stage reads the gated map: after a shut gate no image is told from another."""
    model = nano()
    torch.nn.init.constant_(model.gates[stage][-2].bias, -1e3)
    with torch.no_grad():
        one, other = model.features(image(32, 32)), model.features(image(32, 32))
    equal = [torch.equal(a, b) for a, b in zip(one[:stage], other[:stage], strict=True)]
    assert not any(equal) and not one[stage].any()
    if stage < 2:
        follows = model.host.stages[stage + 1](torch.zeros_like(one[stage]).movedim(1, -1))
        seen = []
        model.host.stages[stage + 1].register_forward_hook(lambda module, inputs, out: seen.append(out))
        with torch.no_grad():
            model(image(32, 32))
        assert torch.equal(seen[0], follows)


def test_gates_only_weaken():
    model, x = nano(), image(40, 24)
    with torch.no_grad():
        _, gates, gated = model.gated(x)
    maps = []
    model.host.stages[0].register_forward_hook(lambda module, inputs, out: maps.append(out))
    with torch.no_grad():
        model(x)
    assert all(((gate > 0) & (gate < 1)).all() for gate in gates)
    torch.testing.assert_close(gated[0], maps[0] * gates[0])
    assert (gated[0].abs() <= maps[0].abs()).all()


def test_the_body_runs_once_and_costs_add_up():
    calls, model = [], create_model("medusa_nano", num_classes=5)
    model.body.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, 32, 32)
    model(x)
    assert len(calls) == 1
    fine = create_model("medusa_nano", num_classes=5, maps=4)
    heads = sum(side**2 * ((dim + 1) * 9 * (dim // 4) + dim // 4 * dim)
                for side, dim in ((8, 64), (4, 128), (4, 256)))
    host, body = (count_macs(part.eval(), (x,)) for part in (model.host, model.body))
    assert count_macs(model, (x,)) == host + body + heads + 256 * 5
    assert count_macs(fine, (x,)) - count_macs(model, (x,)) == 3 * (
        32 * 32 * 8 + 9 * (64 * 16 + 16 * 32 + 16 * 64))


def test_far_pixels_reach_the_first_gates_through_the_body_alone():
    model = nano(widths=(4, 6, 8, 10, 12))
    x = image(96, 96).requires_grad_()
    _, gates, _ = model.gated(x)
    gates[0][0, 0, 0].sum().backward()
    through = x.grad[..., 60:, 60:].abs().sum()
    x.grad = None
    model.host.stages[0](model.host.stem(x))[0, 0, 0].sum().backward()
    assert through > 0 and x.grad[..., 60:, 60:].abs().sum() == 0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_head_trains_the_body(stage):
    model = nano()
    model.gated(image(32, 32))[1][stage].sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in model.body.parameters())


def test_pictures_of_attention():
    model, x = nano(), image(37, 50)
    with torch.no_grad():
        whole, local = model.attention(x)
        with record(model) as seen:
            model(x)
    assert whole.shape == (1, 1, 37, 50) and [gate.shape[2:] for gate in local] == [(10, 13), (5, 7), (5, 7)]
    torch.testing.assert_close(seen["gates.1"].parts[0].weights.mean(-1), local[1][:, 0])


def test_other_hosts():
    model = create_model("medusa_nano", host="swin_nano", num_classes=3)
    assert model(torch.randn(2, 3, 40, 24)).shape == (2, 3)
    with pytest.raises(SaccadeError, match="host='deit_nano'"):
        create_model("medusa_nano", host="deit_nano")
