"""RaftMLP beside its table."""

from __future__ import annotations

import pytest
import torch

from saccade import create_model
from saccade.papers.raftmlp import CARD
from saccade.tools.measure import declared_macs


@pytest.mark.parametrize("name", CARD.macs)
def test_published_sizes(name):
    """Parameters in 0.1 M and multiply-adds in 0.1 G, to the last printed digit."""
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == CARD.params[name] / 1e6
    assert round(declared_macs(model, (image,)) / 1e9, 1) == CARD.macs[name] / 1e9
