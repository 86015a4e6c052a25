"""The classic efficient mixers: their limits are softmax attention, their sums are the quadratic forms."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_mixer
from saccade.papers.survey_efficient import Linformer, Nystrom
from saccade.parts.attention import Attention


def attention_like(mixer):
    wanted = Attention(Site(32, 2)).double()
    wanted.qkv.load_state_dict(mixer.qkv.state_dict())
    wanted.proj.load_state_dict(mixer.proj.state_dict())
    return wanted


def test_linformer_with_all_keys_is_attention():
    mixer = Linformer(Site(32, 2, grid=(3, 5)), few=15).double()
    for mix in (mixer.keys, mixer.values):
        mix.data.copy_(torch.eye(15).view(3, 5, 15))
    x = torch.randn(2, 3, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), attention_like(mixer)(x))


def test_nystrom_with_all_landmarks_is_attention():
    torch.manual_seed(0)
    mixer = Nystrom(Site(32, 2, grid=(3, 5)), landmarks=15, steps=40).double()
    mixer.qkv.weight.data.mul_(4)  # else the matrix to invert is nearly of rank one
    x = torch.randn(2, 3, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), attention_like(mixer)(x), rtol=1e-4, atol=1e-5)
    a = torch.rand(2, 6, 6, dtype=torch.float64).add(torch.eye(6) * 3)
    a = a / a.sum(-1, keepdim=True)
    torch.testing.assert_close(mixer.inverted(a), torch.linalg.inv(a))


def test_linear_attention_is_its_quadratic_form():
    torch.manual_seed(0)
    mixer = create_mixer("linear_attention", Site(32, 2, grid=(3, 5))).double()
    x, prefix = torch.randn(2, 3, 5, 32, dtype=torch.float64), torch.randn(2, 1, 32, dtype=torch.float64)
    tokens = torch.cat([prefix, x.flatten(1, 2)], 1)
    q, k, v = mixer.qkv(tokens).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
    kernel = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    wanted = mixer.proj((kernel / kernel.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    grid, first = mixer(x, prefix=prefix)
    torch.testing.assert_close(torch.cat([first, grid.flatten(1, 2)], 1), wanted)


def test_fourier_by_sums():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    found = create_mixer("fourier_mixing", Site(4, grid=(2, 3)))(x)
    for u, v, w in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        wanted = sum(x[0, a, b, c] * torch.cos(torch.tensor(2 * torch.pi * (u * a / 2 + v * b / 3 + w * c / 4),
                                                            dtype=torch.float64))
                     for a in range(2) for b in range(3) for c in range(4))
        assert found[0, u, v, w] == pytest.approx(float(wanted))
