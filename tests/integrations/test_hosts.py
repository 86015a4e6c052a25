"""Our mixers in models of torchvision and Hugging Face transformers, small and with random weights."""

from __future__ import annotations

import pytest
import torch
import torchvision
import transformers

import saccade
from saccade import SaccadeError
from tests.contracts.registered import randomised

_VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64,
            patch_size=8)
_SEGFORMER = dict(hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
                  decoder_hidden_size=32)
# name: (host, pattern of its attention, how many, whether it is plain softmax attention)
HOSTS = {
    "transformers ViT": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_VIT)),
                         "*.attention", 2, True),
    "transformers DINOv2": (lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**_VIT)),
                            "*.layer.?.attention", 2, True),
    "transformers CLIP": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_VIT)),
                          "*.self_attn", 2, True),
    "transformers SegFormer": (
        lambda: transformers.SegformerForImageClassification(transformers.SegformerConfig(**_SEGFORMER)),
        "*.attention", 4, False),
    "torchvision ViT": (
        lambda: torchvision.models.VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=2,
                                                     hidden_dim=32, mlp_dim=64), "*.self_attention", 2, True),
    "torchvision ConvNeXt": (lambda: torchvision.models.convnext_tiny(), "features.?.*.block.0", 18, False),
}
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(name):
    torch.manual_seed(0)
    make, pattern, count, softmax = HOSTS[name]
    return randomised(make()).eval(), pattern, count, softmax  # torchvision's ViT starts with a head of zeros


def answer(host):
    with torch.no_grad():
        out = host(IMAGE)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("name", HOSTS)
def test_a_mixer_of_the_grid_runs_trains_and_goes(name):
    host, pattern, count, _ = build(name)
    before = answer(host)
    handle = saccade.swap(host, pattern, "neighborhood", prefix_mode="mean", example=IMAGE, kernel=3)
    assert len(handle.names) == count
    after = answer(host)
    assert after.shape == before.shape and not torch.allclose(after, before)
    out = host(IMAGE)
    (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
    new = host.get_submodule(handle.names[0])
    assert all(parameter.grad is not None for parameter in new.parameters())
    handle.undo()
    assert torch.equal(answer(host), before)


@pytest.mark.parametrize("name", [name for name, (*_, softmax) in HOSTS.items() if softmax])
def test_our_attention_with_their_weights_is_theirs(name):
    host, pattern, _, _ = build(name)
    before = answer(host)
    saccade.swap(host, pattern, "attention", keep_weights=True, example=IMAGE)
    torch.testing.assert_close(answer(host), before, rtol=0, atol=1e-5)


def test_what_keeps_more_than_projections_is_refused_by_name():
    host, pattern, _, _ = build("transformers SegFormer")
    with pytest.raises(SaccadeError, match="stages.0.blocks.0.attention holds .*sequence_reduction"):
        saccade.swap(host, pattern, "attention", keep_weights=True, example=IMAGE)


def test_windows_are_refused_with_what_to_name():
    config = transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[2], num_heads=[1],
                                     window_size=4)
    with pytest.raises(SaccadeError, match="sees 32 windows or groups of a batch of 2.*name the module around it"):
        saccade.swap(transformers.SwinForImageClassification(config), "*.attention", "pooling", example=IMAGE)
