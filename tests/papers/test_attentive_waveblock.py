"""What goldens of Attentive WaveBlock do not show: the wave while training, and the scores of the non-local block."""

from __future__ import annotations

import torch

from saccade.papers.attentive_waveblock import NonLocal, WaveBlock


def test_wave_spares_one_band_of_three_tenths_and_rests_in_evaluation():
    torch.manual_seed(0)
    block, x, starts = WaveBlock(), torch.ones(2, 16, 3, 4), set()
    for _ in range(60):
        rows = block(x)[0, :, 0, 0]
        kept = (rows == 1).nonzero().flatten().tolist()
        assert kept == list(range(kept[0], kept[0] + 5)) and rows.sum() == 5 + 1.5 * 11
        starts.add(kept[0])
    assert min(starts) == 0 and max(starts) == 11
    assert torch.equal(block.eval()(x), x) and torch.equal(WaveBlock(waved=False)(x), x)


def test_non_local_is_its_scores_over_the_number_of_tokens():
    block, x = NonLocal(8).double().eval(), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.nn.init.normal_(block.norm.weight)
    tokens = x.flatten(1, 2)
    scores = block.theta(tokens) @ block.phi(tokens).transpose(1, 2) / 15
    torch.testing.assert_close(block(x), x + block.norm(block.proj(scores @ block.g(tokens))).view(x.shape))
