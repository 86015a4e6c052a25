"""What TokenFormer's goldens do not show: growth, its forms in loops, causality, bad numbers."""

from __future__ import annotations

from math import erf, exp

import pytest
import torch

from saccade import SaccadeError, Site, create_model
from saccade.papers.tokenformer import FORMS, Pattention, TokenformerAttention, grow
from tests.contracts.registered import randomised


def gelu(x):
    return x * (1 + erf(x / 2**0.5)) / 2


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_loops(form):
    layer = randomised(Pattention(3, 2, 5, form)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for token, found in zip(x, layer(x)):
        scores = [sum(float(a * b) for a, b in zip(token, key)) for key in layer.keys.detach()]
        if form == "softmax":
            weights = [5 * exp(s) / sum(map(exp, scores)) for s in scores]
        elif form == "gelu_l2_norm":
            size = sum(gelu(s) ** 2 for s in scores) ** 0.5
            weights = [5**0.5 * gelu(s) / size for s in scores]
        else:
            size = sum(s * s for s in scores) ** 0.5
            weights = [gelu(5**0.5 * s / size) for s in scores]
        wanted = [sum(w * float(value[c]) for w, value in zip(weights, layer.values.detach())) for c in range(2)]
        assert found.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("form", ["l2_norm_gelu", "gelu_l2_norm"])
def test_growing_keeps_the_output_and_new_pairs_learn(form):
    model = randomised(create_model("tokenformer_nano", num_classes=5, form=form)).double().eval()
    image = torch.randn(2, 3, 37, 29, dtype=torch.float64)
    before, count = model(image).detach(), sum(weight.numel() for weight in model.parameters())
    assert grow(model, 16) == 5 * 4
    assert grow(model, 8, "blocks.*.mlp") == 4
    assert sum(weight.numel() for weight in model.parameters()) == count + 4 * 2 * 64 * (5 * 16 + 8)
    torch.testing.assert_close(model(image), before, rtol=1e-12, atol=1e-12)
    layer = model.blocks[0].mixer.query
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(image).square().sum().backward()
    assert layer.keys.grad[48:].abs().min() > 0  # zero keys have a gradient; their values get one once they have moved
    optimizer.step()
    assert (model(image) - before).abs().max() > 1e-6


def test_a_checkpoint_loads_into_a_larger_model(tmp_path):
    small = randomised(create_model("tokenformer_nano", num_classes=5)).eval()
    torch.save(small.state_dict(), tmp_path / "small.pt")
    large = create_model("tokenformer_nano", num_classes=5, grown=(8, 4, 32), checkpoint_path=tmp_path / "small.pt")
    assert large.blocks[0].mixer.query.keys.shape == (56, 64) and large.blocks[3].mlp.values.shape == (224, 64)
    assert len(large.load_report.resized) == 4 * 5 * 2
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(large.eval()(image), small(image))


def test_a_causal_attention_sees_no_later_token():
    mixer = randomised(TokenformerAttention(Site(16, 2, grid=(9,)), causal=True, rotary=0.25)).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    moved = x.clone()
    moved[0, 5] += 1
    with torch.no_grad():
        change = (mixer(moved) - mixer(x)).abs().amax(-1)[0]
    assert change[:5].max() == 0 and change[5:].min() > 0


def test_a_token_of_zeros_has_an_output_and_a_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    out = Pattention(4, 3, 6)(x)
    assert torch.equal(out, torch.zeros(2, 3))
    out.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 10


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="l2_norm_gelu"):
        Pattention(4, 4, 8, "l2_norm_geul")
    with pytest.raises(SaccadeError, match="no key is without weight"):
        Pattention(4, 4, 8, "softmax").grow(2)
    with pytest.raises(SaccadeError, match="in pairs"):
        TokenformerAttention(Site(24, 2), rotary=0.25)
    with pytest.raises(SaccadeError, match="nothing can grow"):
        grow(create_model("deit_nano"), 4)
