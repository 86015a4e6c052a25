"""EViT beside its definition, written out."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from saccade import apply, create_model
from saccade.papers.evit import keep_at, set_keep
from tests.contracts.registered import randomised


def test_the_tokens_that_stay_are_the_most_attended():
    """By the whole attention map, and the fused token by a loop."""
    model = randomised(create_model("deit_nano")).double().eval()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        tokens, grid = model.tokens(image)
        block = model.blocks[0]
        q, k, _ = block.mixer.qkv(block.norm1(tokens)).view(2, 65, 3, 2, 32).permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(-2, -1) / 32**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
        x, prefix = block.mixer(block.norm1(tokens)[:, 1:].unflatten(1, grid), block.norm1(tokens)[:, :1])
        mixed = tokens + torch.cat([prefix, x.flatten(1, 2)], 1)
        wanted = []
        for one, weight in zip(mixed, seen, strict=True):
            order = sorted(range(64), key=lambda token: -float(weight[token]))
            stay, go = order[:ceil(0.3 * 64)], order[ceil(0.3 * 64):]
            fused = sum(weight[token] * one[1 + token] for token in go)
            wanted.append(torch.stack([one[0], *(one[1 + token] for token in stay), fused]))
        wanted = torch.stack(wanted)
        wanted = wanted + block.mlp(block.norm2(wanted))
        apply(model, "evit", keep=0.3, layers=(0,))
        torch.testing.assert_close(model.blocks[0](tokens), wanted)


def test_the_rate_falls_along_half_a_cosine():
    assert [keep_at(progress, 0.5) for progress in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    model = create_model("deit_nano").eval()
    apply(model, "evit", keep=1.0, layers=(1,))
    image = torch.randn(1, 3, 32, 32)
    assert model.forward_features(image).shape[1] == 65
    set_keep(model, 0.25)
    assert model.forward_features(image).shape[1] == 1 + 16 + 1
