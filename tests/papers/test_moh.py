"""What MoH's goldens do not show: routing in loops, the balance loss, gates put on a trained attention, bad numbers."""

from __future__ import annotations

from math import exp

import pytest
import torch

from benchmarks.textbook.moh import gates
from saccade import SaccadeError, Site, create_model, load, record
from saccade.papers.moh import AggregatedMixtureOfHead, HeadGate, MixtureOfHead, load_balance
from saccade.parts.aggregated import AggregatedAttention, CosineAttention
from tests.contracts.registered import randomised

SITE = Site(24, 6, grid=(5, 4))


def softmax(logits):
    powers = [exp(float(logit)) for logit in logits.detach()]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(("shared", "routed"), [(2, 2), (0, 3), (1, 5), (6, 0)])
def test_gates_of_each_token_in_loops(shared, routed):
    gate = randomised(HeadGate(SITE, shared, routed)).double()
    x = torch.randn(2, 5, 4, 24, dtype=torch.float64)
    with torch.no_grad():
        ours, textbook = gate(x).flatten(0, -2), gates(gate, x).flatten(0, 1)
        for token, found in zip(x.view(-1, 24), ours):
            wanted = [shared * share for share in softmax(gate.share.weight @ token)] if shared > 1 else [1.0] * shared
            if routed:
                scores = softmax(gate.route.weight @ token)
                best = sorted(scores, reverse=True)[:routed]
                chosen = [routed * score / sum(best) if score in best else 0.0 for score in scores]
                a, b = softmax(gate.balance.weight @ token) if shared else (0.5, 0.5)
                wanted = [2 * a * share for share in wanted] + [2 * b * score for score in chosen]
            assert found.tolist() == pytest.approx(wanted)
            assert int((found > 0).sum()) == shared + routed
    torch.testing.assert_close(ours, textbook)


@pytest.mark.parametrize(("plain", "gated"), [(CosineAttention, MixtureOfHead),
                                              (AggregatedAttention, AggregatedMixtureOfHead)])
def test_output_is_the_sum_of_gated_heads(plain, gated):
    mixer = randomised(gated(SITE, shared=2, routed=2)).double()
    x = torch.randn(2, 5, 4, 24, dtype=torch.float64)
    heads = plain(SITE).double()
    heads.load_state_dict(mixer.state_dict(), strict=False)
    heads.proj = torch.nn.Identity()
    with torch.no_grad():
        H, g = heads(x), mixer.gate(x)
        wanted = mixer.proj.bias.expand(x.shape)
        for head in range(6):
            own = slice(4 * head, 4 * head + 4)
            wanted = wanted + g[..., head, None] * (H[..., own] @ mixer.proj.weight[:, own].T)
        torch.testing.assert_close(mixer(x), wanted)


def test_balance_loss_in_loops():
    layers = torch.nn.Sequential(*(randomised(MixtureOfHead(SITE, *heads)) for heads in ((2, 2), (6, 0), (1, 3))))
    seen = []
    for layer in layers.double():
        layer.gate.register_forward_hook(lambda gate, inputs, out: seen.append((gate, inputs[0].flatten(0, -2))))
    with load_balance(layers) as losses:
        layers(torch.randn(2, 5, 4, 24, dtype=torch.float64))
    layers(torch.randn(2, 5, 4, 24, dtype=torch.float64))
    assert len(losses) == 2  # the layer without routed heads has none, and the second forward was not watched
    for loss, (gate, tokens) in zip(losses, (seen[0], seen[2])):
        taken, score = [0.0] * gate.choices, [0.0] * gate.choices
        for token in tokens:
            scores = softmax(gate.route.weight @ token)
            for head, value in enumerate(scores):
                taken[head] += (value in sorted(scores)[-gate.routed:]) / len(tokens)
                score[head] += value / len(tokens)
        assert float(loss.detach()) == pytest.approx(gate.choices * sum(f * p for f, p in zip(taken, score)))
    sum(losses).backward()
    last = layers[2].gate
    assert float(last.route.weight.grad.abs().max()) > 0 and last.balance.weight.grad is None


def test_balance_loss_is_least_for_even_use():
    gate = HeadGate(Site(4, 4), 0, 1)
    torch.nn.init.eye_(gate.route.weight)
    model = torch.nn.Sequential(gate)
    with load_balance(model) as losses:
        model(10 * torch.eye(4)[None])  # each token takes its own head
        model(10 * torch.eye(4)[:1].expand(1, 4, 4))  # all take the first
    even, first = (float(loss.detach()) for loss in losses)
    assert even == pytest.approx(1, abs=1e-3) and first == pytest.approx(4, abs=0.01)


def test_trained_attention_keeps_its_output_where_all_heads_are_kept():
    """Gates of weight zero are one: a trained TransNeXt becomes a MoH that starts from the same scores."""
    plain = randomised(create_model("transnext_nano", num_classes=5)).double().eval()
    gated = create_model("moh_nano", num_classes=5, routed=(0, 3, 6)).double().eval()
    report = load(gated, plain.state_dict(), fresh=("*.gate.*",))
    assert report.loaded == len(plain.state_dict()) and len(report.fresh) == 1 + 2 * 2 + 2 * 3
    image = torch.randn(2, 3, 37, 29, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(gated(image), plain(image))
        for module in gated.modules():
            if isinstance(module, HeadGate):
                for weight in module.parameters():
                    weight.zero_()
        torch.testing.assert_close(gated(image), plain(image))


def test_a_watcher_sees_the_gates():
    mixer = torch.nn.Sequential(MixtureOfHead(SITE, 2, 2))
    x = torch.randn(2, 5, 4, 24)
    with torch.no_grad(), record(mixer) as r:
        mixer(x)
        wanted = mixer[0].gate(x).flatten(1, -2).transpose(1, 2)
    torch.testing.assert_close(r["0.gate"].parts[0].weights, wanted[..., None])


@pytest.mark.parametrize(("shared", "routed"), [(2, 5), (7, 0), (3, 0), (2, -1)])
def test_heads_that_do_not_add_up_are_one_line(shared, routed):
    with pytest.raises(SaccadeError, match=f"shared={shared}, routed={routed} of 6 heads"):
        HeadGate(SITE, shared, routed)
