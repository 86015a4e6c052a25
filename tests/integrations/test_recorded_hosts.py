"""The attention of models that know nothing of us is recorded, and what they compute stays as it was."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
import transformers

import saccade

_SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
             patch_size=8)
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def hf_vit(attention):
    return transformers.ViTForImageClassification._from_config(
        transformers.ViTConfig(**_SIZE), attn_implementation=attention)


# name: (host, name of its first attention)
HOSTS = {
    "timm ViT": (lambda: timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=32, depth=2, embed_dim=32,
                                           num_heads=2), "blocks.0.attn"),
    "torchvision ViT": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64), "encoder.layers.*_0"),
    "transformers ViT, fused": (lambda: hf_vit("sdpa"), "vit.layers.0.attention"),
    "transformers ViT, written out": (lambda: hf_vit("eager"), "vit.layers.0.attention"),
}


def scores(host):
    with torch.no_grad():
        out = host(IMAGE)
    return getattr(out, "logits", out)


def expected(name, host):
    """The attention of the first layer, from what its norm gives and its own projections."""
    seen = []
    norm = {"timm ViT": "blocks.0.norm1", "torchvision ViT": "encoder.layers.encoder_layer_0.ln_1"}
    hook = host.get_submodule(norm.get(name, "vit.layers.0.layernorm_before")).register_forward_hook(
        lambda module, inputs, output: seen.append(output))
    scores(host)
    hook.remove()
    if name == "timm ViT":
        q, k, _ = host.blocks[0].attn.qkv(seen[0]).chunk(3, -1)
    elif name == "torchvision ViT":
        attention = host.encoder.layers[0].self_attention
        q, k, _ = torch.nn.functional.linear(seen[0], attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    else:
        attention = host.vit.layers[0].attention
        q, k = attention.q_proj(seen[0]), attention.k_proj(seen[0])
    q, k = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in (q, k))
    return (q @ k.mT / 4).softmax(-1)


@pytest.mark.parametrize("name", HOSTS)
def test_attention_of_hosts(name):
    torch.manual_seed(0)
    make, pattern = HOSTS[name]
    host = make().eval()
    before = scores(host)
    with saccade.record(host) as everything:
        assert torch.allclose(scores(host), before, atol=1e-6)
    assert len(everything.keys()) == 2  # each layer once
    (key,) = (key for key in everything.keys() if "0" in key)
    torch.testing.assert_close(everything[key].dense(batch=2), expected(name, host), rtol=1e-4, atol=1e-6)
    with saccade.record(host, f"{pattern}*") as first:
        scores(host)
    assert first.keys() == [key]


def test_no_weights_of_multihead_attention_where_none_were_asked():
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    host = torch.nn.ModuleDict({"layer": layer})
    x = torch.randn(1, 5, 8)
    with saccade.record(host):
        assert layer(x, x, x, need_weights=False)[1] is None
        assert layer(x, x, x)[1].shape == (1, 5, 5)
        assert layer(x, x, x, average_attn_weights=False)[1].shape == (1, 2, 5, 5)


def test_masks_and_causal_attention_are_in_the_weights():
    class Host(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.inner = torch.nn.Identity()
            self.options = options

        def forward(self, x):
            q = self.inner(x)[:, None]
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, **self.options)

    x = torch.randn(1, 4, 8)
    mask = torch.tensor([True, True, False, True])
    for options, zero in (({"is_causal": True}, ~torch.ones(4, 4).tril().bool()),
                          ({"attn_mask": mask.expand(4, 4)}, ~mask.expand(4, 4))):
        host = torch.nn.Sequential(Host(**options))
        with saccade.record(host) as r:
            out = host(x)
        weights = r["0"].dense()[0, 0]
        assert torch.equal(weights == 0, zero)
        torch.testing.assert_close(weights @ x[0], out[0, 0])


def test_channels_and_windows_of_hosts_have_no_numbers():
    xcit = timm.create_model("xcit_nano_12_p16_224", img_size=64).eval()
    with saccade.record(xcit, "blocks.*.attn") as r, torch.no_grad():
        xcit(torch.randn(1, 3, 64, 64))
    assert len(r.keys()) == 12 and not any(r[key].placed for key in r.keys())
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=32, depths=(1, 1),
                             num_heads=(2, 4)).eval()
    with saccade.record(swin) as r, torch.no_grad():
        swin(torch.randn(1, 3, 64, 64))
    assert r.keys() == ["layers.0.blocks.0.attn", "layers.1.blocks.0.attn"]
    assert not r["layers.0"].placed and r["layers.0"].parts[0].weights.shape == (16, 2, 16, 16)


def test_our_mixer_in_a_host_is_recorded_once():
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    saccade.swap(host, "blocks.0.attn", "attention")
    with saccade.record(host) as r, torch.no_grad():
        host(torch.randn(1, 3, 64, 64))
    assert [len(affinity.parts) for affinity in r.affinities.values()] == [1, 1]
