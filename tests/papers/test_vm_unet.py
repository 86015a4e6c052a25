"""VM-UNet: the contracts of a backbone, put to a network whose output is a mask."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental._config as fx_config

from saccade import create_model
from saccade.papers.vm_unet import PatchExpand
from tests.contracts.registered import randomised


def build(**options):
    torch.manual_seed(0)
    return randomised(create_model("vm_unet_narrow", **options)).eval()


@pytest.mark.parametrize("size", [(32, 32), (41, 29), (7, 33)])
def test_a_mask_of_the_image_s_size(size):
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        mask, logits = build()(image), build(num_classes=4)(image)
    assert mask.shape == (2, 1, *size) and 0 < mask.min() and mask.max() < 1
    assert logits.shape == (2, 4, *size) and logits.min() < 0


def test_padding_is_all_that_an_odd_size_adds():
    model, image = build(), torch.randn(1, 3, 29, 30)
    with torch.no_grad():
        whole = model(torch.nn.functional.pad(image, (0, 2, 0, 3)))
        torch.testing.assert_close(model(image), whole[..., :29, :30])


def test_features_are_the_encoder_s():
    model = create_model("vm_unet_narrow", features_only=True).eval()
    maps = model(torch.randn(1, 3, 32, 48))
    assert [value.shape for value in maps] == [(1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6)]
    assert model.feature_info.reduction() == [2, 4, 8]


def test_one_channel_is_repeated():
    model, gray = build(), torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(gray), model(gray.repeat(1, 3, 1, 1)))
    assert build(in_chans=1)(gray).shape == (1, 1, 32, 32)


def test_batch_elements_do_not_meet():
    model, image = build().double(), torch.randn(3, 3, 32, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image)[1:2], model(image[1:2]), rtol=1e-8, atol=1e-9)


def test_every_parameter_learns():
    model = build(drop_path_rate=0.1).train()
    (model(torch.randn(4, 3, 32, 32)) * torch.randn(4, 1, 32, 32)).sum().backward()
    assert [name for name, value in model.named_parameters()
            if value.grad is None or not value.grad.isfinite().all() or value.grad.abs().max() == 0] == []


def test_another_mixer_and_other_ranks():
    model = create_model("vm_unet_narrow", mixer={"decoder.*": "pooling"})
    names = [type(stage.blocks[0].mixer).__name__ for stage in (*model.encoder, *model.decoder)]
    assert names == ["CrossScan"] * 3 + ["Pooling"] * 3
    assert create_model("vm_unet_narrow", img_size=(16, 16, 16))(torch.randn(1, 3, 16, 8, 9)).shape == (1, 1, 16, 8, 9)


def test_patch_expanding_puts_a_token_s_parts_row_by_row():
    layer = PatchExpand(2, 1, 1)
    layer.norm = torch.nn.Identity()
    with torch.no_grad():
        layer.expand.weight.copy_(torch.tensor([[1.0], [2], [3], [4]]))
        out = layer(torch.tensor([1.0, 10]).view(1, 1, 2, 1))
    assert out[0, ..., 0].tolist() == [[1, 2, 10, 20], [3, 4, 30, 40]]


@pytest.mark.slow
def test_exported_once_runs_at_four_sizes():
    model = build(mixer={"decoder.*": "pooling", "encoder.[12].*": "pooling"})  # one cross-scan: tracing takes long
    sides = {2: torch.export.Dim("height", min=16, max=128), 3: torch.export.Dim("width", min=16, max=128)}
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():
        free = {0: torch.export.Dim.AUTO, **sides}
        program = torch.export.export(model, (torch.randn(2, 3, 40, 56),), dynamic_shapes=(free,))
        for size in [(40, 56), (32, 32), (64, 48), (51, 37)]:
            image = torch.randn(2, 3, *size)
            torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)
