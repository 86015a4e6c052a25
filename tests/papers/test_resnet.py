"""ResNet beside torchvision's, and what may stand in its blocks."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.golden import fill
from saccade.parts.resnet import Convolution
from saccade.tools.measure import count_macs


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_checkpoint(name, tmp_path):
    """torchvision's own file loads whole and computes what its model computes, in evaluation and on odd sizes."""
    models = pytest.importorskip("torchvision.models")
    theirs = getattr(models, name)().eval()
    kinds = {"running_mean": "mean", "running_var": "var"}
    state = {key: fill(key, value.shape, kinds.get(key.rpartition(".")[2], "param"))
             for key, value in theirs.state_dict().items() if value.ndim}
    theirs.load_state_dict(state, strict=False)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = create_model(name, checkpoint_path=tmp_path / "weights.pth").eval()
    assert ours.load_report.format == "authors"
    assert ours.load_report.loaded == ours.load_report.of == len(theirs.state_dict())
    image = torch.randn(1, 3, 75, 64)
    with torch.no_grad():
        wanted = theirs(image)
        torch.testing.assert_close(ours(image), wanted, rtol=0, atol=1e-4 * float(wanted.std()))


def test_multiply_adds():
    """torchvision's table, in 1e9."""
    for name, wanted in {"resnet18": 1.814, "resnet50": 4.089, "resnext50_32x4d": 4.230}.items():
        with torch.device("meta"):
            model, image = create_model(name), torch.empty(1, 3, 224, 224)
        assert count_macs(model, (image,)) == pytest.approx(wanted * 1e9, rel=1e-3)


def test_mixers_stand_where_there_is_no_stride():
    model = create_model("resnet_nano", mixer="attention")
    kinds = [type(block.mixer).__name__ for stage in model.stages for block in stage.blocks]
    assert kinds == ["Attention", "Convolution", *["Attention"] * 3]
    basic = create_model("resnet18", mixer="attention", num_classes=0)
    assert not any(isinstance(module, Convolution) for module in basic.modules())
    last = create_model("resnet_nano", mixer={"stages.2.blocks.1": "pooling"}).stages[2].blocks[1]
    assert type(last.mixer).__name__ == "Pooling" and last.site.dim == 64  # of 256
    with pytest.raises(SaccadeError, match="matches no block"):
        create_model("resnet_nano", mixer={"stages.1.blocks.0": "pooling"})
