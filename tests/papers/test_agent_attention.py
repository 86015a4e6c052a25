"""Agent attention: windows, layouts and the paper's multiply-adds."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model, record
from saccade.papers.agent_attention import CARD, Agent, PrefixedAgent, WindowAgent
from saccade.tools.measure import declared_macs


def test_windows_are_agent_attention_each_by_itself():
    torch.manual_seed(0)
    mixer = WindowAgent(Site(16, 2, grid=(8, 8)), pool=2, window=4).double().eval()
    whole = Agent(Site(16, 2, grid=(4, 4)), pool=2).double().eval()
    whole.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    shifted = WindowAgent(Site(16, 2, index=1, grid=(8, 8)), pool=2, window=4).double().eval()
    shifted.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[:, 4:, :4], whole(x[:, 4:, :4]))
        torch.testing.assert_close(shifted(x)[:, 2:6, 2:6], whole(x[:, 2:6, 2:6]))
        wrapped = x.roll((-6, -6), (1, 2))[:, :4, :4]  # the window that joins the four corners, without a mask
        torch.testing.assert_close(shifted(x).roll((-6, -6), (1, 2))[:, :4, :4], whole(wrapped))


def test_stages_and_blocks_with_agents():
    with torch.device("meta"):
        deit, swin = create_model("agent_deit_b"), create_model("agent_swin_s")
        mixed = create_model("agent_swin_t", mixer={"stages.2.blocks.1": "pooling"})
    assert [isinstance(block.mixer, PrefixedAgent) for block in deit.blocks] == [True] * 4 + [False] * 8
    kinds = [{type(block.mixer).__name__ for block in stage.blocks} for stage in swin.stages]
    assert kinds == [{"Agent"}, {"Agent"}, {"ShiftedWindow"}, {"ShiftedWindow"}]
    kinds = [type(block.mixer).__name__ for block in mixed.stages[2].blocks]
    assert kinds == ["Agent", "Pooling", "Agent", "Agent", "Agent", "Agent"]


def test_agents_stand_for_the_middle_of_what_they_pool():
    mixer = torch.nn.Sequential(Agent(Site(16, 2, grid=(9, 6)), pool=3))
    with torch.no_grad(), record(mixer) as r:
        mixer(torch.randn(1, 9, 6, 16))
    assert r["0"].parts[1].key[0].tolist() == [6, 8, 10, 24, 26, 28, 42, 44, 46]


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    side = int(name.rsplit("_", 1)[-1]) if name[-1].isdigit() else 224
    with torch.device("meta"):
        macs = declared_macs(create_model(name), (torch.empty(1, 3, side, side),))
    assert macs == pytest.approx(CARD.macs[name], rel=0.01, abs=0.1e9)
