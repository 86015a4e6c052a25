"""What the goldens of complex attention do not show: its pairs one by one, rotary attention as its start, zeros."""

from __future__ import annotations

from math import atan2, cos, exp

import pytest
import torch

from saccade import SaccadeError, Site
from saccade.papers.complexformer import ComplexAttention, turns
from tests.contracts.registered import randomised


@pytest.mark.parametrize("causal", [False, True])
def test_scores_in_loops(causal):
    mixer = randomised(ComplexAttention(Site(8, 2, grid=(5,)), causal)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (part.tolist() for part in mixer.qkv(x)[0].view(5, 3, 2, 4).permute(1, 2, 0, 3))
        rates = turns(2, 2, x.device, x.dtype)[1].tolist()
        assert rates == [1, 0.010009765625]  # 0.01 in bfloat16
        mixed = []
        for i in range(5):
            row = []
            for head in range(2):
                delta, b = mixer.factor[head].tolist(), mixer.offset[head].tolist()
                weights = []
                for j in range(i + 1 if causal else 5):
                    score = 0.0
                    for c in range(2):
                        (a, ai), (e, ei) = ((one[head][at][c], one[head][at][c + 2]) for one, at in ((q, i), (k, j)))
                        angle = delta[c] * (atan2(ai, a) - atan2(ei, e)) + b[c] + (i - j) * rates[c]
                        score += (a * a + ai * ai + 1e-9) ** 0.5 * (e * e + ei * ei + 1e-9) ** 0.5 * cos(angle)
                    weights.append(exp(score))
                row += [sum(w * v[head][j][c] for j, w in enumerate(weights)) / sum(weights) for c in range(4)]
            mixed.append(row)
        torch.testing.assert_close(mixer(x), mixer.proj(torch.tensor([mixed], dtype=torch.float64)))


def test_it_starts_as_rotary_attention():
    """delta = 1 and b = 0: the scores are the real part of q times the conjugate of k, turned by (i - j) g."""
    mixer, x = ComplexAttention(Site(8, 2, grid=(6,))).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        place = turns(6, 2, x.device, x.dtype)
        q, k = (torch.complex(*one.chunk(2, -1)) * torch.polar(torch.ones_like(place), place) for one in (q, k))
        weights = (q @ k.mH).real.softmax(-1)
        wanted = mixer.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixer(x), wanted, rtol=1e-6, atol=1e-7)


def test_only_the_distance_counts():
    """The same tokens behind others, which are masked away, look at each other as before."""
    mixer = randomised(ComplexAttention(Site(8, 2))).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    turned = mixer.turned(x.repeat(1, 1, 2, 1)), mixer.turned(x.repeat(1, 1, 2, 1), mixer.offset)
    scores = turned[1] @ turned[0].mT
    torch.testing.assert_close(scores[..., :3, :3], scores[..., 3:, 3:])


def test_a_token_of_zeros_has_a_gradient():
    mixer = randomised(ComplexAttention(Site(8, 2)))
    x = torch.zeros(1, 4, 8, requires_grad=True)
    (mixer(x) * torch.randn(1, 4, 8)).sum().backward()
    assert x.grad.isfinite().all() and all(value.grad.isfinite().all() for value in mixer.parameters())


def test_class_tokens_come_first():
    mixer = randomised(ComplexAttention(Site(8, 2))).double()
    prefix, x = torch.randn(2, 1, 8, dtype=torch.float64), torch.randn(2, 3, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        mixed, first = mixer(x, prefix)
        whole = mixer(torch.cat([prefix, x.flatten(1, 2)], 1))
    torch.testing.assert_close(torch.cat([first, mixed.flatten(1, 2)], 1), whole)


def test_an_odd_head_is_one_line():
    with pytest.raises(SaccadeError, match="3 channels a head"):
        ComplexAttention(Site(6, 2))
