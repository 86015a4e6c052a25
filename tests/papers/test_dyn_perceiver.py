"""Dynamic Perceiver: early exit gives each image what its exit gives, on other hosts too."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.core.keymap import rename
from saccade.papers.dyn_perceiver import DynamicPerceiver, exit_loss
from saccade.parts.early_exit import confidence, exits_at, solve_thresholds
from saccade.parts.regnet import regnet_names, regnet_pyramid
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


def model():
    torch.manual_seed(0)
    return randomised(create_model("dyn_perceiver_nano", num_classes=5)).eval()


def test_each_image_leaves_at_its_own_exit_with_that_exits_scores():
    network, image = model(), torch.randn(12, 3, 32, 32)
    with torch.no_grad():
        every = torch.stack(network.exits(image))
        assert torch.equal(every[-1], network(image))
        sure = confidence(every)
        thresholds = [float(row.quantile(0.6)) for row in sure]
        scores, exits = network.early(image, thresholds)
        assert torch.equal(exits, exits_at(sure, thresholds)) and exits.unique().numel() >= 3
        torch.testing.assert_close(scores, every.gather(0, exits[None, :, None].expand(1, -1, 5))[0])
        assert network.early(image, [0, 2, 2, 2])[1].tolist() == [0] * 12
        assert network.early(image, [2, 2, 2, 2])[1].tolist() == [3] * 12
    with pytest.raises(SaccadeError, match="4 exits"):
        network.early(image, [0.5])


def test_what_leaves_is_not_computed():
    class Early(torch.nn.Module):
        def __init__(self, network, thresholds):
            super().__init__()
            self.network, self.thresholds = network, thresholds

        def forward(self, image):
            return self.network.early(image, self.thresholds)[0]

    network, image = model(), torch.randn(4, 3, 32, 32)
    first, whole = (count_macs(Early(network, [level] * 4), (image,)) for level in (0, 2))
    assert first < 0.8 * whole and whole == count_macs(network, (image,))


def test_thresholds_of_a_validation_set_hold_in_the_network():
    network, image = model(), torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        sure = confidence(torch.stack(network.exits(image)))
    thresholds = solve_thresholds(sure, (1.0, 2.0, 2.5, 3.0), 2.0)
    exits = network.early(image, thresholds)[1]
    assert torch.tensor([1.0, 2.0, 2.5, 3.0])[exits].mean() <= 2.0 + 1e-6


@pytest.mark.parametrize("host", ["swin_tiny", "convnext_tiny", "pvt_v2_b0"])
def test_any_pyramid_of_four_stages_is_a_host(host):
    pyramid = create_model(host, num_classes=0, img_size=64)
    network = DynamicPerceiver(pyramid, 16, (1, 1, 1, 1), num_classes=3, img_size=64).eval()
    with torch.no_grad():
        scores = network.exits(torch.randn(2, 3, 64, 64))
    assert len(scores) == 4 and all(one.shape == (2, 3) and one.isfinite().all() for one in scores)


def test_on_a_resnet_the_branches_meet_before_each_stage():
    """Widths of the latents are those of the maps that enter the stages; the block that strides comes after."""
    network = create_model("dyn_perceiver_resnet50_0375_t64", num_classes=3, img_size=64).eval()
    assert [meeting.local.weight.shape[0] for meeting in network.meetings] == [24, 96, 192, 384]
    assert [meeting.local.weight.shape[0] for meeting in create_model("dyn_perceiver_resnet18_t128").meetings] == [
        64, 64, 128, 256]
    seen = []
    for meeting in network.meetings:
        meeting.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert seen == [16, 16, 8, 4]


def test_hosts_that_do_not_fit():
    with pytest.raises(SaccadeError, match="3 stages"):
        DynamicPerceiver(create_model("swin_nano"))
    with pytest.raises(SaccadeError, match="multiple of 8"):
        DynamicPerceiver(create_model("swin_tiny"), latents=12)


def test_loss_is_that_of_the_authors_training():
    scores, label = [torch.randn(3, 4, dtype=torch.float64) for _ in range(4)], torch.tensor([0, 3, 1])
    probabilities = [one.softmax(1) for one in scores]
    own = [-sum(float(p[row, c].log()) for row, c in enumerate(label)) / 3 for p in probabilities]
    distance = [float((probabilities[3] * (probabilities[3] / p).log()).sum()) / 3 for p in probabilities[:3]]
    wanted = 0.5 * own[0] + 0.5 * own[1] + own[2] + own[3] + 0.5 * sum(distance)
    assert float(exit_loss(scores, label)) == pytest.approx(wanted)
    network = model().train()
    exit_loss(network.exits(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("name, count", [("reg400m_t32", 11592972), ("reg800m_t128", 21798360),
                                         ("reg3x2g_t128", 62743346)])
def test_parameters_on_regnets_are_those_of_the_authors_code(name, count):
    with torch.device("meta"):
        network = create_model(f"dyn_perceiver_{name}")
    assert sum(value.numel() for value in network.parameters()) == count
    assert network.feature_info.reduction() == [4, 8, 16, 32]


def test_the_regnet_is_torchvisions():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs, image = randomised(models.regnet_y_400mf()).eval(), torch.randn(2, 3, 64, 96)
    ours = regnet_pyramid((48, 104, 208, 440), (1, 3, 6, 6), 8).eval()
    names = (*regnet_names(), (r"fc\.(.*)", r"head.fc.\1"))
    ours.load_state_dict(rename(theirs.state_dict(), names).state)
    with torch.no_grad():
        wanted = theirs(image)
        torch.testing.assert_close(ours(image), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
