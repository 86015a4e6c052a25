"""What goldens of IBN-Net do not show: training, DenseNet and the other kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import create_model
from saccade.papers.ibn_net import InstanceBatchNorm, InstanceNorm


def test_instance_norm_is_torchs():
    ours, theirs = InstanceNorm(6).double(), nn.InstanceNorm2d(6, affine=True).double()
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64) * 3 + 2
    torch.testing.assert_close(ours(x), theirs(x.movedim(-1, 1)).movedim(1, -1))
    torch.testing.assert_close(ours(x[:, :1, :1]), ours.bias.expand(2, 1, 1, 6))


@pytest.mark.parametrize("last", [False, True])
def test_in_training_the_batch_part_uses_and_follows_batch_statistics(last):
    norm, batch, x = InstanceBatchNorm(10, 0.4, last).double(), nn.BatchNorm1d(6).double(), torch.randn(3, 4, 5, 10)
    x, share = x.double(), slice(0, 6) if last else slice(4, 10)
    out = norm(x)
    torch.testing.assert_close(out[..., share], batch(x[..., share].reshape(-1, 6)).view(3, 4, 5, 6))
    torch.testing.assert_close(norm.BN.running_var, batch.running_var)
    norm.eval(), batch.eval()
    torch.testing.assert_close(norm(x)[..., share], batch(x[..., share].reshape(-1, 6)).view(3, 4, 5, 6))


def test_densenet_grows_and_takes_any_mixer():
    model = create_model("densenet_ibn_nano", mixer="attention", features_only=True)
    assert model.feature_info.channels() == [24, 28]
    assert [tuple(value.shape) for value in model(torch.randn(1, 3, 64, 64))] == [
        (1, 24, 16, 16), (1, 28, 8, 8)]
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters())
                  for name in ("densenet121_ibn_a", "densenet161_ibn_a", "densenet201_ibn_a")}
    # torchvision's DenseNets: the norms have as many parameters.
    assert counts == {"densenet121_ibn_a": 7978856, "densenet161_ibn_a": 28681000, "densenet201_ibn_a": 20013928}
