"""DDRNet: sizes, both branches' grids, the auxiliary head, pooling by hand, another mixer."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from saccade import create_model
from saccade.golden import make_state, read_golden
from saccade.papers.ddrnet import CARD, DAPPM, enlarged
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


def build(**options):
    torch.manual_seed(0)
    return randomised(create_model("ddrnet_narrow", **options)).eval()


@pytest.mark.parametrize(("name", "macs"), [("ddrnet_23_slim", 36.3e9), ("ddrnet_23", 143.1e9), ("ddrnet_39", 281.2e9)])
def test_the_paper_s_parameters_and_multiply_adds(name, macs):
    with torch.device("meta"):
        model, image = create_model(name).eval(), torch.empty(1, 3, 1024, 2048)
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(CARD.params[name], rel=0.01)
    assert count_macs(model, (image,)) == pytest.approx(macs, rel=0.02)


@pytest.mark.parametrize("size", [(64, 64), (41, 97), (8, 130), (1, 7)])
def test_logits_are_an_eighth_of_any_picture(size):
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert build(num_classes=5)(image).shape == (2, 5, *(-(-side // 8) for side in size))


def test_training_gives_what_the_auxiliary_head_sees():
    model, image = create_model("ddrnet_narrow", auxiliary=True, num_classes=4).train(), torch.randn(2, 3, 128, 192)
    given = model(image)
    assert {name: value.shape for name, value in given.items()} == dict.fromkeys(("out", "auxiliary"), (2, 4, 16, 24))
    sum((value * torch.randn_like(value)).sum() for value in given.values()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []
    assert create_model("ddrnet_narrow").train()(image).shape == (2, 19, 16, 24)


def test_the_fusions_of_a_size_with_two_at_a_sixteenth():
    model = create_model("ddrnet_narrow", depths=(1, 1, 4, 1), fusions=2, auxiliary=True)
    assert len(model.context) == 6 and len(model.detail) == 4 and len(model.down) == len(model.compress) == 3
    assert [len(stage) for stage in model.context] == [1, 1, 2, 2, 1, 1]
    middle, x = model.run(torch.randn(2, 3, 64, 64))
    assert middle.shape == (2, 8, 8, 16) and x.shape == (2, 8, 8, 32)


def test_pooling_written_out():
    torch.manual_seed(0)
    layer = randomised(DAPPM(2, 6, 4, 5)).double().eval()
    x = torch.randn(2, 11, 9, 6, dtype=torch.float64)
    image = x.permute(0, 3, 1, 2)

    def unit(module, value):
        return module(value.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    found = [unit(layer.scales[0], image)]
    for number, (kernel, stride) in enumerate(((5, 2), (9, 4), (17, 8), (None, None)), 1):
        if kernel is None:
            pooled = image.mean((2, 3), keepdim=True)
        else:
            ones = torch.ones(6, 1, kernel, kernel, dtype=torch.float64) / kernel**2  # zeros of the border count
            pooled = F.conv2d(image, ones, stride=stride, padding=kernel // 2, groups=6)
        wide = F.interpolate(unit(layer.scales[number], pooled), (11, 9), mode="bilinear", align_corners=False)
        found.append(unit(layer.process[number - 1], wide + found[-1]))
    wanted = unit(layer.compress, torch.cat(found, 1)) + unit(layer.shortcut, image)
    torch.testing.assert_close(layer(x), wanted.permute(0, 2, 3, 1))


def test_enlarging_keeps_a_constant_and_reads_between():
    x = torch.tensor([0.0, 4.0]).view(1, 2, 1)
    assert enlarged(x, (4,)).flatten().tolist() == [0, 1, 3, 4]
    torch.testing.assert_close(enlarged(torch.full((1, 2, 3, 1), 7.0), (5, 5)), torch.full((1, 5, 5, 1), 7.0))


def test_another_mixer_copies_and_classes():
    model = create_model("ddrnet_narrow", mixer={"detail.*": "pooling"}, num_classes=3).eval()
    names = {type(block.mixer).__name__ for stage in model.detail for block in stage}
    assert names == {"Pooling"} and type(model.context[0][0].mixer).__name__ == "Convolution"
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(image), model(image))
        assert create_model("ddrnet_narrow", num_classes=0).eval()(image).shape == (1, 32, 5, 5)
        assert create_model("ddrnet_narrow", in_chans=1).eval()(image[:, :1]).shape == (1, 19, 5, 5)


def test_batch_elements_do_not_meet():
    model, image = build().double(), torch.randn(3, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image)[1:2], model(image[1:2]))


def test_a_checkpoint_as_trained_has_the_auxiliary_head_and_the_loss(tmp_path):
    golden = read_golden(Path(__file__).parents[1] / "goldens" / "ddrnet_23_slim.json")
    state = {f"model.{name}": value for name, value in make_state(golden).items()}
    extra = {f"model.seghead_extra.{name}": torch.randn(shape) for name, shape in (
        ("bn1.weight", (64,)), ("bn1.bias", (64,)), ("bn1.running_mean", (64,)), ("bn1.running_var", (64,)),
        ("conv1.weight", (64, 64, 3, 3)), ("bn2.weight", (64,)), ("bn2.bias", (64,)), ("bn2.running_mean", (64,)),
        ("bn2.running_var", (64,)), ("conv2.weight", (19, 64, 1, 1)), ("conv2.bias", (19,)))}
    torch.save(state | extra | {"loss.criterion.weight": torch.ones(19)}, tmp_path / "best.pth")
    plain = create_model("ddrnet_23_slim", checkpoint_path=tmp_path / "best.pth")
    both = create_model("ddrnet_23_slim", auxiliary=True, checkpoint_path=tmp_path / "best.pth")
    assert torch.equal(both.auxiliary.out[2].bias, extra["model.seghead_extra.conv2.bias"]) and plain.auxiliary is None
    assert torch.equal(plain.stem[0].weight, both.stem[0].weight)
