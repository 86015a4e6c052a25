"""T2T-ViT, beyond its goldens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, create_model
from saccade.papers.t2t_vit import CARD, TokenPerformer, sinusoid, soft_split
from saccade.tools.measure import declared_macs


@pytest.mark.parametrize("kernel, stride", [(7, 4), (3, 2), (3, 1)])
@pytest.mark.parametrize("grid", [(16, 16), (9, 21), (7, 5)])
def test_the_soft_split_is_unfold(grid, kernel, stride):
    x = torch.randn(2, *grid, 5)
    padding = (kernel - stride + 1) // 2
    wanted = F.unfold(x.permute(0, 3, 1, 2), kernel, stride=stride, padding=padding).transpose(1, 2)
    assert torch.equal(soft_split(x, kernel, stride).flatten(1, 2), wanted)


def test_the_soft_split_of_a_volume():
    x = torch.arange(4 * 4 * 4.0).view(1, 4, 4, 4, 1)
    split = soft_split(x, 2, 2)
    assert split.shape == (1, 2, 2, 2, 8)
    assert split[0, 1, 0, 1].tolist() == x[0, 2:4, 0:2, 2:4, 0].flatten().tolist()


def test_random_features_are_softmax_on_average():
    """With many features, phi(q) . phi(k) comes near exp(q . k)."""
    torch.manual_seed(0)
    performer = TokenPerformer(Site(8), ratio=1)
    performer.features = torch.randn(200_000, 8)
    q, k = torch.randn(1, 4, 8) / 3, torch.randn(1, 4, 8) / 3
    product = performer.positive(q) @ performer.positive(k).mT
    torch.testing.assert_close(product, (q @ k.mT).exp(), rtol=0.05, atol=0)


def test_positions_are_the_sinusoid_of_the_sequence():
    table = sinusoid(5, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert float(table[3, 2]) == pytest.approx(float(torch.tensor(3 / 10000 ** (2 / 6)).sin()))
    assert float(table[3, 5]) == pytest.approx(float(torch.tensor(3 / 10000 ** (4 / 6)).cos()))
    model = create_model("t2t_vit_nano")
    assert torch.equal(model.position[0], sinusoid(65, 64)) and "position" not in dict(model.named_parameters())


@pytest.mark.parametrize("name", ["t2t_vit_14", "t2t_vit_24", "t2t_vit_t_14"])
def test_published_multiply_adds(name):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    assert declared_macs(model, (image,)) == pytest.approx(CARD.macs[name], rel=0.1)


def test_own_checkpoint_returns_and_gray_is_refused(tmp_path):
    """The first layer is a norm over joined neighbourhoods: no single tensor of it can be summed over channels."""
    model, image = create_model("t2t_vit_nano", num_classes=5).eval(), torch.randn(1, 3, 32, 32)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = create_model("t2t_vit_nano", num_classes=5, checkpoint_path=tmp_path / "w.pt").eval()
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    with pytest.raises(SaccadeError, match="stem.blocks.0.norm1"):
        create_model("t2t_vit_nano", num_classes=5, in_chans=1, checkpoint_path=tmp_path / "w.pt")


def test_unknown_tokens():
    with pytest.raises(SaccadeError, match="performer"):
        create_model("t2t_vit_nano", tokens="convolution")
