"""ULSAM's module in its two forms, and its networks beside the paper's tables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, create_model, record
from saccade.papers.mobilenet import CARD as HOSTS
from saccade.papers.ulsam import CARD, SIZES, SubspaceAttention, SubspaceBlock, largest_neighbour
from saccade.parts.reparameterize import reparameterize
from saccade.tools.measure import declared_macs
from tests.contracts.registered import randomised


def measured(name):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    return sum(parameter.numel() for parameter in model.parameters()), declared_macs(model, (image,))


@pytest.mark.parametrize("name", CARD.params)
def test_published_differences(name):
    """What the modules save or add: the tables count from hosts of round numbers (3.4 M, 300 M)."""
    host = name.removeprefix("ulsam_").removesuffix("_added")
    while host not in HOSTS.params:
        host = host.rpartition("_")[0]
    (count, macs), (host_count, host_macs) = measured(name), measured(host)
    digits = 0.02e6 if "v2" in name else 0.1e6
    assert count - host_count == pytest.approx(CARD.params[name] - HOSTS.params[host], abs=digits)
    digits = 0.02e6 if "v2" in name else 0.5e6  # v1's are printed in millions
    assert macs - host_macs == pytest.approx(CARD.macs[name] - HOSTS.macs[host], abs=digits)
    assert macs == pytest.approx(CARD.macs[name], rel=0.01)


@pytest.mark.parametrize("grid", [(7,), (5, 6), (3, 4, 2)])
def test_two_forms(grid):
    """Watched and trained it runs as layers, else norms folded and a subspace at a time."""
    mixer = randomised(SubspaceAttention(Site(12, grid=grid), subspaces=3)).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    mixer.train()(x)  # moves the statistics of its norms
    mixer.eval()
    with torch.no_grad():
        quick = mixer(x)
        with record(model := torch.nn.Sequential(mixer)) as r:
            torch.testing.assert_close(model(x), quick, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(reparameterize(mixer)(x), quick, rtol=1e-12, atol=1e-12)
    (part,) = r["0"].parts
    assert part.weights.shape == (2, 3, 1, x[0, ..., 0].numel())
    torch.testing.assert_close(part.weights.sum(-1), torch.ones(2, 3, 1, dtype=torch.float64))


def test_largest_neighbour():
    for pool, grid in ((F.max_pool1d, (9,)), (F.max_pool2d, (1, 6)), (F.max_pool3d, (3, 1, 5))):
        x = torch.rand(2, *grid, 4)
        assert torch.equal(largest_neighbour(x), pool(x.movedim(-1, 1), 3, stride=1, padding=1).movedim(1, -1))


def test_where_the_modules_stand():
    blocks = dict(create_model("ulsam_mobilenet_v2", num_classes=0).named_modules())
    assert [name for name, block in blocks.items() if isinstance(block, SubspaceBlock)] == [
        "stages.3.blocks.5", "stages.4.blocks.1"]
    assert create_model("ulsam_nano", subspaces=8).stages[1].blocks[0].mixer.subspaces == 8
    assert sum(row.depth for row in SIZES["ulsam_mobilenet_v2_96_96_160_160"]["rows"]) == 17
    with pytest.raises(SaccadeError, match="5 subspaces do not divide 24 channels"):
        create_model("ulsam_nano", subspaces=5)
