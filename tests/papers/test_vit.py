"""ViT and DeiT beside timm's, on the same weights; position tables at other sizes."""

from __future__ import annotations

import pytest
import timm
import torch

from saccade import create_model, load
from saccade.parts.position import resample


@pytest.mark.parametrize(("name", "theirs"), [
    ("deit_tiny_patch16_224", "deit_tiny_patch16_224"),
    ("deit_t", "deit_tiny_patch16_224"),
    ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224"),
    ("vit_tiny_patch16_224", "vit_tiny_patch16_224"),
])
def test_equal_to_timm(name, theirs):
    torch.manual_seed(0)
    host = timm.create_model(theirs, depth=3).eval()
    for parameter in host.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = create_model(name, depth=3).eval()
    report = load(ours, host.state_dict())
    assert report.loaded == report.of == len(ours.state_dict()) and not report.left
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), host(image), rtol=1e-4, atol=1e-5)


def test_gradients_equal_timms():
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    ours = create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    load(ours, host.state_dict())
    image = torch.randn(2, 3, 64, 64)
    host(image).square().sum().backward()
    ours(image).square().sum().backward()
    ours_qkv, host_qkv = ours.blocks[0].mixer.qkv, host.blocks[0].attn.qkv
    torch.testing.assert_close(ours_qkv.weight.grad, host_qkv.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.position.grad, host.pos_embed.grad, rtol=1e-4, atol=1e-6)


def test_distilled_trains_two_heads():
    model = create_model("deit_tiny_distilled_patch16_224", depth=1, img_size=32, num_classes=3)
    image = torch.randn(2, 3, 32, 32)
    both = model.train()(image)
    assert set(both) == {"scores", "distilled"}
    torch.testing.assert_close(model.eval()(image), (both["scores"] + both["distilled"]) / 2)


def test_position_table_of_another_size_is_resampled_when_loaded():
    """As DeiT's own code: bicubic over the grid part, the class token's position kept."""
    torch.manual_seed(0)
    small, large = (create_model("vit_tiny_patch16_224", depth=1, img_size=side, num_classes=2) for side in (64, 96))
    report = load(large, small.state_dict())
    assert report.resized == ["position"]
    torch.testing.assert_close(large.position[:, :1], small.position[:, :1])
    grid = torch.nn.functional.interpolate(
        small.position[:, 1:].detach().view(1, 4, 4, -1).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic")
    torch.testing.assert_close(large.position[:, 1:].detach(), grid.permute(0, 2, 3, 1).flatten(1, 2))


def test_resample_of_the_native_grid_is_the_table_itself():
    table = torch.randn(1, 4, 5, 3)
    assert resample(table, (4, 5)) is table
    assert resample(table, (8, 3)).shape == (1, 8, 3, 3)
