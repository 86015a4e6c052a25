"""Our mixers in models of timm, torchvision and Hugging Face transformers, small and with random weights."""

from __future__ import annotations

import pytest
import timm
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
_SWIN = dict(embed_dim=32, depths=[2, 2], num_heads=[2, 4])
# Hosts whose attention is cut into windows of 4: the pattern names it all the same.
SWINS = {
    "timm Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, **_SWIN),
                  "layers.*.attn", 4, False),
    "torchvision Swin": (lambda: torchvision.models.SwinTransformer(patch_size=[4, 4], window_size=[4, 4], **_SWIN),
                         "*.attn", 4, False),
    "transformers Swin": (lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(image_size=64, patch_size=4, window_size=4, **_SWIN)), "*.attention", 4, False),
}
# name: (host, pattern of its attention, how many, whether it is plain softmax attention)
HOSTS = SWINS | {
    "timm ViT": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), "blocks.*.attn", 2, True),
    "timm ConvNeXt": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1)), "*.conv_dw", 5, False),
    "timm PVTv2": (lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), "*.attn", 4, False),
    "timm MetaFormer": (lambda: timm.create_model("poolformer_s12"), "stages.?.blocks.0.token_mixer", 4, False),
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


@pytest.mark.parametrize("name", SWINS)
def test_our_shifted_windows_with_their_weights_are_theirs(name):
    """The projections are kept; the biases of positions stay behind, and are put in by hand."""
    host, pattern, _, _ = build(name)
    before, tables = answer(host), [value for key, value in host.named_parameters() if "relative_position_bias" in key]
    saccade.swap(host, pattern, "shifted_window", keep_weights=True, example=IMAGE, window=4)
    new = [module for module in host.modules() if type(module).__name__ == "ShiftedWindow"]
    for mixer, table in zip(new, tables, strict=True):
        mixer.bias.table.data.copy_(table)
    torch.testing.assert_close(answer(host), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SWINS)
def test_a_host_that_trains_is_watched_in_evaluation_and_trains_again(name):
    host, pattern, _, _ = build(name)
    seen = []
    next(host.children()).register_forward_hook(lambda module, args, output: seen.append(module.training))
    saccade.swap(host.train(), pattern, "pooling", example=IMAGE)
    assert seen and not any(seen) and all(module.training for module in host.modules())


@pytest.mark.parametrize("mixer, options", [
    ("neighborhood", dict(kernel=5, bias=False)), ("fused_neighborhood", dict(kernel=5)),
    ("window", dict(window=5)),
], ids=["neighborhood", "fused_neighborhood", "window"])
def test_what_sees_the_whole_grid_is_softmax_attention(mixer, options):
    """On 5 x 5 tokens a 5 x 5 neighborhood, or window, holds all: the host's output, with the host's weights."""
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", img_size=80, depth=2, class_token=False, global_pool="avg").eval()
    image = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        before = host(image)
        saccade.swap(host, "blocks.*.attn", mixer, keep_weights=True, **options)
        torch.testing.assert_close(host(image), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, pattern", [
    ("davit_tiny", "stages.0.blocks.0.0.attn"),  # its blocks also hold convolutions
    ("swinv2_cr_tiny_ns_224", "stages.0.blocks.?.attn"),  # norms after the attention
])
def test_windows_of_other_blocks_are_refused_with_what_to_name(name, pattern):
    host = timm.create_model(name, **({"img_size": 64, "window_size": 4} if "swin" in name else {}))
    with pytest.raises(SaccadeError, match="windows or groups of a batch of 2.*name the module around it"):
        saccade.swap(host, pattern, "pooling", example=IMAGE)
