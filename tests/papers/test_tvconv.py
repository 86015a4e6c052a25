"""TVConv against loops, fixed once trained, and on another grid than its own."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import SaccadeError, Site, create_model
from saccade.core.keymap import rename
from saccade.core.load import load
from saccade.papers.tvconv import ShuffleNet, TVConv, shuffle_names
from saccade.parts.mobilenet import SmallDepthwise
from saccade.parts.position import resample
from saccade.parts.reparameterize import reparameterize
from tests.contracts.registered import randomised


def in_loops(weights, bias, x, stride):
    """out[i] = b[i] + sum_o W[o, i] x[stride i + o], a place at a time."""
    reach = round(weights.shape[0] ** 0.5) // 2
    out = bias.expand(x.shape[0], *bias.shape).clone()
    for i, j in product(*map(range, bias.shape[:2])):
        for number, (up, left) in enumerate(product(range(-reach, reach + 1), repeat=2)):
            row, column = stride * i + up, stride * j + left
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                out[:, i, j] += weights[number, i, j] * x[:, row, column]
    return out


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("native", [(5, 4), (3, 7)])
def test_against_loops(stride, native):
    mixer = TVConv(Site(6, grid=native), kernel=5, stride=stride, width=8, layers=1, bias=True)
    mixer = randomised(mixer).double().eval()
    x = torch.randn(2, 5 * stride - stride // 2, 4 * stride, 6, dtype=torch.float64)
    with torch.no_grad():
        weights, bias = mixer.maps()
        expected = in_loops(resample(weights, (5, 4), linear=True), resample(bias[None], (5, 4), linear=True)[0], x,
                            stride)
        torch.testing.assert_close(mixer(x), expected, rtol=1e-12, atol=1e-12)


def test_fixed_once_trained():
    model = randomised(create_model("tvconv_nano")).eval()
    fixed = reparameterize(model)
    image = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        torch.testing.assert_close(fixed(image), model(image), rtol=1e-4, atol=1e-4)
    assert not any("affinity" in name or "weight_layers" in name for name in fixed.state_dict())


def test_weights_of_another_native_grid():
    """Affinity maps and the norms' affines are resampled when they are loaded."""
    small = randomised(create_model("tvconv_nano")).eval()
    large = create_model("tvconv_nano", img_size=48)
    report = load(large, small.state_dict())
    assert len(report.resized) == 25  # an affinity map and two norms in each of five blocks
    first = "stages.0.blocks.0.mixer.maps.affinity"
    torch.testing.assert_close(large.get_parameter(first),
                               resample(small.get_parameter(first), (48, 48), linear=True))


def test_the_shuffle_net_around_it():
    """With plain depthwise layers it is torchvision's ShuffleNet V2, but for the stem's stride and the head."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = randomised(models.shufflenet_v2_x0_5()).eval()
    theirs.conv1[0].stride, theirs.fc = (1, 1), torch.nn.Identity()
    ours = ShuffleNet((48, 96, 192), (3, 7, 3), make=SmallDepthwise, stem_dim=24, last=1024, num_classes=0,
                      img_size=48).eval()
    left = ours.load_state_dict(rename(theirs.state_dict(), shuffle_names()).state, strict=False)
    assert not left.unexpected_keys and all(name.startswith("head.") for name in left.missing_keys)
    image = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        wanted = theirs(image)
        got = ours.forward_features(image)
    torch.testing.assert_close(got.mean((2, 3)), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_shuffle_nets_of_the_authors():
    """Grids of 24, 12 and 6 tokens from 96 pixels; half of the channels are mixed."""
    with torch.device("meta"):
        model = create_model("tvconv_shufflenet_v2_x1_0")
    mixers = [(name, tuple(module.maps.affinity.shape[1:3]), module.maps.dim)
              for name, module in model.named_modules() if isinstance(module, TVConv)]
    assert mixers[:2] == [("stem.4.local", (24, 24), 58), ("stem.4.skip.0", (24, 24), 24)]
    assert ("stages.1.downsample.skip.0", (12, 12), 116) in mixers and mixers[-1][1:] == ((6, 6), 232)
    assert len(mixers) == 3 * 2 + 3 + 7 + 3
    with pytest.raises(SaccadeError, match="matches no block"):
        create_model("tvconv_shufflenet_nano", mixer={"stages.1.downsample": "pooling"})
