"""HyperZZW: the operator against its definition, kernels that see no image, standardisation, the local loss."""

from __future__ import annotations

import copy

import torch

from saccade import Site, create_mixer, create_model
from saccade.papers.hyperzzw import GroupStandardisation, product, repeated, standardised
from saccade.parts.slow_net import SlowNet


def test_operator_against_loops():
    mixer = create_mixer("hyper_zzw", Site(4, grid=(5, 5))).double()
    x = torch.randn(2, 5, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        kernel, out = mixer.slow((5, 5)), mixer(x)
        wanted = torch.zeros_like(x)
        for row in range(5):
            for column in range(5):
                for inner in range(5):
                    wanted[:, row, column] += x[:, row, inner] * kernel[row, inner] * x[:, inner, column]
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(mixer(-3 * x), 9 * out)


def test_a_map_that_is_not_square():
    a, y = torch.rand(1, 4, 6, 3), torch.ones(1, 4, 6, 3)
    torch.testing.assert_close(product(a, y), a.sum(2, keepdim=True).expand(1, 4, 6, 3))


def test_standardisation_of_batch_and_images():
    x = 3 + torch.randn(4, 5, 6, 8, dtype=torch.float64) * torch.arange(1, 5).view(4, 1, 1, 1)
    out = GroupStandardisation(8, 4).double()(x)
    batch = torch.nn.functional.batch_norm(x.movedim(-1, 1), None, None, training=True).movedim(1, -1)
    image = torch.nn.functional.instance_norm(x.movedim(-1, 1)).movedim(1, -1)
    for channel in range(8):
        torch.testing.assert_close(out[..., channel], (image if channel // 2 % 2 else batch)[..., channel])
    torch.testing.assert_close(standardised(x, False), image)


def test_slow_networks_take_any_grid_and_narrow_their_planes():
    net = SlowNet((8, 8), 3, 16, 2)
    with torch.no_grad():
        net.plane.fill_(0.5)
        ours = net((8, 8))
        torch.testing.assert_close(net((15, 15))[::14, ::14], ours[::7, ::7])  # the corners stay at -1 and 1
    assert net((5, 11)).shape == (5, 11, 3) and net.resize("plane", torch.ones(6, 6)).shape == (8, 8)


def test_local_loss():
    model = create_model("terminator_nano", num_classes=2)
    assert model.feedback() > 0
    for block in model.blocks:
        torch.nn.init.zeros_(block.slow.out.weight)
        torch.nn.init.zeros_(block.slow.out.bias)
    assert model.feedback() == 0


def test_a_model_in_training_can_be_copied():
    model = create_model("terminator_nano", num_classes=2)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    copy.deepcopy(model)


def test_channels_are_repeated():
    assert repeated(torch.arange(3.0), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
