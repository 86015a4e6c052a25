"""MobileNets beside torchvision's and timm's, and what may stand in their blocks."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.golden import fill
from saccade.papers.mobilenet import CARD
from saccade.parts.mobilenet import SmallDepthwise
from saccade.tools.measure import count_macs


def compare(name, theirs, layout, file):
    """Their own file loads whole and computes what their model computes, in evaluation and on odd sizes."""
    theirs.eval()
    kinds = {"running_mean": "mean", "running_var": "var"}
    state = {key: fill(key, value.shape, kinds.get(key.rpartition(".")[2], "param"))
             for key, value in theirs.state_dict().items() if value.ndim}
    theirs.load_state_dict(state, strict=False)
    torch.save(theirs.state_dict(), file)
    ours = create_model(name, checkpoint_path=file).eval()
    assert ours.load_report.format == layout
    assert ours.load_report.loaded == ours.load_report.of == len(theirs.state_dict())
    image = torch.randn(1, 3, 75, 64)
    with torch.no_grad():
        wanted = theirs(image)
        torch.testing.assert_close(ours(image), wanted, rtol=0, atol=1e-4 * float(wanted.std()))


@pytest.mark.parametrize(("name", "width"), [("mobilenet_v2", 1.0), ("mobilenet_v2_050", 0.5)])
def test_torchvision_checkpoint(name, width, tmp_path):
    models = pytest.importorskip("torchvision.models")
    compare(name, models.mobilenet_v2(width_mult=width), "authors", tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_050", "mobilenetv2_140"])
def test_timm_checkpoint(name, tmp_path):
    timm = pytest.importorskip("timm")
    compare(name, timm.create_model(name), "timm", tmp_path / "weights.pth")


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    assert count_macs(model, (image,)) == pytest.approx(CARD.macs[name], rel=0.01)


def test_maps():
    model = create_model("mobilenet_v2", features_only=True)
    assert model.feature_info.channels() == [16, 24, 32, 96, 320]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]


def test_mixers_stand_where_there_is_no_stride():
    model = create_model("mobilenet_v2_nano", mixer="pooling")
    assert [type(block.mixer).__name__ for stage in model.stages for block in stage.blocks] == 3 * ["Pooling"]
    assert sum(isinstance(module, SmallDepthwise) for module in model.modules()) == 2
    one = create_model("mobilenet_v2_nano", mixer={"stages.1.blocks.0": "pooling"}).stages[1].blocks[0]
    assert type(one.mixer).__name__ == "Pooling" and one.site.dim == 96  # of 24
    with pytest.raises(SaccadeError, match="matches no block"):
        create_model("mobilenet_v2_nano", mixer={"stages.1.downsample": "pooling"})
