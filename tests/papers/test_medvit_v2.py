"""What goldens and contracts do not say of MedViTV2."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_model
from saccade.papers.medvit_v2 import RunPooledAttention, scrambled, unscrambled


def test_scrambled_tokens_are_runs_of_pixels_of_a_channel():
    x = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4)
    image = x.permute(0, 3, 1, 2)
    assert torch.equal(scrambled(x)[1, 0, 1], image[1, 0].flatten()[4:8])
    assert torch.equal(unscrambled(scrambled(x)), x)


def test_keys_are_means_of_runs_of_tokens():
    """Tokens beyond a multiple of the run have no key; fewer tokens than a run make one."""
    torch.manual_seed(0)
    mixer = RunPooledAttention(Site(32, 1, grid=(3, 3)), reduction=2).double().eval()
    x = torch.randn(1, 3, 3, 32, dtype=torch.float64)
    moved = x.clone()
    moved[0, 2, 2] += 1  # the ninth of nine tokens, in runs of four
    with torch.no_grad():
        same = (mixer(moved) - mixer(x)).abs().amax(-1).flatten() < 1e-12
        one = mixer(x[:, :1])
    assert same.tolist() == [True] * 8 + [False]
    value = mixer.proj(mixer.kv(mixer.norm(x[0, 0].mean(0, keepdim=True)))[:, 32:])
    torch.testing.assert_close(one, value.expand_as(one))


def test_the_paper_s_mixers_stand_where_it_says():
    model = create_model("medvit_v2_tiny", mixer={"stages.3.*": "identity"})
    kinds = [type(block.mixer).__name__ for stage in model.stages for block in stage.blocks]
    local, whole = "ScrambledNeighborhood", "RunPooledAttention"
    assert kinds == [local, local, local, whole, *[local, local, whole] * 2, "Identity"]
    assert [block.site.dim for block in model.stages[2].blocks] == [192, 192, 160] * 2


def test_a_global_block_needs_channels_for_both_parts():
    with pytest.raises(SaccadeError, match="64 channels, 64 of them attending, leave 0"):
        create_model("medvit_v2_nano", dims=(32, 64, 128))
