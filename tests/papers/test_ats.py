"""ATS beside its definition, written out."""

from __future__ import annotations

import torch

from saccade import apply, create_model
from saccade.papers.ats import AtsBlock
from saccade.parts.host import Kept
from tests.contracts.registered import randomised


def one_block(samples: int) -> tuple[AtsBlock, torch.Tensor]:
    model = randomised(create_model("deit_nano")).double().eval()
    with torch.no_grad():
        tokens, _ = model.tokens(torch.randn(3, 3, 32, 32, dtype=torch.float64))
    return AtsBlock(samples, False, block=model.blocks[0], prefix=1, kept=Kept(), first=True), tokens


def test_the_tokens_that_stay_are_those_nearest_to_equal_steps():
    """By a loop over the steps and the tokens, from the whole attention map."""
    block, tokens = one_block(20)
    with torch.no_grad():
        q, k, v = block.queries_keys_values(tokens)
        map_ = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        block(tokens)
    for image, kept in enumerate(block.kept.numbers):
        score = [float(map_[image, :, 0, 1 + token].sum() * v[image, :, 1 + token].norm()) for token in range(64)]
        order = sorted(range(64), key=score.__getitem__)
        total, sums = 0.0, []
        for token in order:
            total += score[token] / sum(score)
            sums.append(total)
        share = [(value - sums[0]) / (sums[-1] - sums[0]) for value in sums]
        steps = [share[1] + (1 - share[1]) * step / 19 for step in range(20)]
        met = sorted({min(range(64), key=lambda place: abs(step - share[place])) for step in steps})
        assert kept[kept >= 0].tolist() == [0, *(1 + order[place] for place in met)]


def test_pictures_keep_different_numbers_and_padding_changes_nothing():
    model = randomised(create_model("deit_nano", num_classes=5)).eval()
    apply(model, "ats", samples=20, layers=(0, 2))
    image = torch.randn(4, 3, 32, 32) * torch.tensor([0.1, 1, 3, 9]).view(-1, 1, 1, 1)
    with torch.no_grad():
        together, lengths = model(image), (model.blocks[5].kept.numbers >= 0).sum(1)
        alone = torch.cat([model(one[None]) for one in image])
    assert len(set(lengths.tolist())) > 1
    torch.testing.assert_close(together, alone)
