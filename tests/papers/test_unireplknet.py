"""What UniRepLKNet's goldens do not show: merged kernels of every size, other kinds of data."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_model
from saccade.papers.unireplknet import BRANCHES, DilatedReparam, as_image
from saccade.parts.norm import BatchNorm
from saccade.parts.reparameterize import reparameterize


def with_statistics(module):
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            torch.nn.init.normal_(part.running_mean)
            torch.nn.init.uniform_(part.running_var, 0.5, 2)
            torch.nn.init.normal_(part.weight)
            torch.nn.init.normal_(part.bias)
    return module.double().eval()


@pytest.mark.parametrize("kernel, rank", [*((kernel, rank) for kernel in BRANCHES for rank in (1, 2)), (5, 3), (7, 3)])
def test_one_kernel_equals_its_branches(kernel, rank):
    grid = {1: (40,), 2: (18, 15), 3: (6, 7, 5)}[rank]
    module, x = with_statistics(DilatedReparam(Site(4, grid=grid), kernel)), torch.randn(2, *grid, 4).double()
    conv = module.deployed()
    assert tuple(conv.weight.shape) == (4, 1, *[kernel] * rank)
    torch.testing.assert_close(conv(x), module(x))


def test_a_merged_branch_lies_on_multiples_of_its_dilation():
    module = with_statistics(DilatedReparam(Site(2, grid=(9, 9)), 13))
    for name, branch in module.branches.items():
        if name != "k3_4":
            torch.nn.init.zeros_(branch[0].weight)
    kernel = module.deployed().weight[0, 0]
    assert kernel.nonzero().tolist() == [[row, column] for row in (2, 6, 10) for column in (2, 6, 10)]


def test_deployed_model_is_smaller_and_equal():
    model = with_statistics(create_model("unireplknet_nano", num_classes=3, layer_scale=0.5))
    deployed, image = reparameterize(model), torch.randn(2, 3, 37, 29).double()
    with torch.no_grad():
        torch.testing.assert_close(deployed(image), model(image))
    assert not any(isinstance(module, BatchNorm) for module in deployed.modules())
    assert sum(p.numel() for p in deployed.parameters()) < sum(p.numel() for p in model.parameters())


def test_published_sizes_of_the_deployed_form():
    """The README counts deployed parameters: 4.4, 6.2 and 31.0 million."""
    for name, million in (("unireplknet_a", 4.44), ("unireplknet_f", 6.24), ("unireplknet_t", 31.04)):
        model = reparameterize(create_model(name).eval())
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, abs=0.02)


@pytest.mark.parametrize("kind, shape, image", [
    ("audio", (2, 20, 16), (2, 1, 20, 16)), ("video", (2, 6, 3, 8, 10), (2, 3, 16, 30)),
    ("points", (2, 3, 5, 8, 8), (2, 5, 8, 24)), ("series", (2, 12, 7, 4), (2, 4, 12, 7)),
])
def test_other_data_as_images(kind, shape, image):
    x = torch.randn(shape)
    out = as_image(x, kind)
    assert tuple(out.shape) == image
    assert torch.equal(out.flatten().sort().values, x.flatten().sort().values)  # nothing lost, nothing twice
    model = create_model("unireplknet_nano", in_chans=image[1], num_classes=2).eval()
    assert model(out).shape == (2, 2)
    with pytest.raises(SaccadeError, match="as_image"):
        as_image(x[0], kind)


def test_video_tiles_keep_frames_whole():
    x = torch.randn(1, 6, 3, 8, 10)
    out = as_image(x, "video")
    assert torch.equal(out[0, :, 8:16, 10:20], x[0, 4])  # second row, second of three columns
