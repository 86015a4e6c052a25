"""Swapping our mixers into models that know nothing of us."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import saccade
from saccade import SaccadeError
from saccade.integrations.slot import Manner, learn

timm = pytest.importorskip("timm")
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ATTENTION = "blocks.*.attn"


def vit(**options):
    torch.manual_seed(0)
    options = dict(img_size=64, depth=2, num_classes=3) | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


HOSTS = {
    "class token": (dict(), 1),
    "registers": (dict(reg_tokens=4, no_embed_class=True), 5),
    "no prefix": (dict(class_token=False, global_pool="avg"), 0),
    "any size": (dict(dynamic_img_size=True, dynamic_img_pad=True), 1),
}


@pytest.mark.parametrize("options, prefix", HOSTS.values(), ids=HOSTS)
def test_attention_with_kept_weights_is_the_host(options, prefix):
    host = vit(**options)
    before, old = host(IMAGE), host.blocks[1].attn
    handle = saccade.swap(host, ATTENTION, "attention", keep_weights=True)
    assert handle.names == ["blocks.0.attn", "blocks.1.attn"]
    assert host.blocks[0].attn.manner == Manner("BNC", prefix, 16) and host.blocks[0].attn.native == (4, 4)
    assert type(host.blocks[1].attn.mixer).__module__ == "saccade.parts.attention"
    torch.testing.assert_close(host(IMAGE), before, rtol=0, atol=1e-5)
    handle.undo()
    assert host.blocks[1].attn is old and torch.equal(host(IMAGE), before)


@pytest.mark.parametrize("mode", ["none", "mean"])
@pytest.mark.parametrize("options", [HOSTS["class token"][0], HOSTS["registers"][0]], ids=["class token", "registers"])
def test_a_mixer_of_the_grid_trains_and_travels(options, mode):
    host = vit(**options)
    before = host(IMAGE)
    handle = saccade.swap(host, ATTENTION, "neighborhood", prefix_mode=mode, kernel=3)
    host.train().forward_features(IMAGE).pow(3).sum().backward()
    for name, parameter in host.blocks[0].attn.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    host.eval()
    after = host(IMAGE)
    assert not torch.allclose(after, before)
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert torch.equal(other(IMAGE), after)
    handle.undo()
    assert torch.equal(host(IMAGE), before)
    assert not any(module._forward_pre_hooks for module in host.modules())


def test_prefix_tokens_receive_what_the_caller_says():
    received = {}
    for mode in ("none", "mean"):
        host = vit()
        saccade.swap(host, ATTENTION, "pooling", prefix_mode=mode)
        x = torch.randn(1, 17, 192, generator=torch.Generator().manual_seed(1))
        out = host.blocks[0].attn(x)
        torch.testing.assert_close(out[:, 1:].mT.unflatten(2, (4, 4)), nn.functional.avg_pool2d(
            x[:, 1:].mT.unflatten(2, (4, 4)), 3, 1, 1, count_include_pad=False) - x[:, 1:].mT.unflatten(2, (4, 4)))
        received[mode] = out[:, 0] - (out[:, 1:].mean(1) if mode == "mean" else 0)
    torch.testing.assert_close(received["none"], received["mean"], rtol=0, atol=1e-6)
    assert received["none"].abs().max() == 0


@pytest.mark.parametrize("size", [(64, 96), (40, 70), (96, 64)])
def test_the_grid_follows_the_image_also_in_copies(size):
    host = vit(dynamic_img_size=True, dynamic_img_pad=True)
    grids = []

    class Shapes(nn.Module):
        def forward(self, x):
            grids.append(tuple(x.shape[1:-1]))
            return x

    saccade.swap(host, ATTENTION, lambda site: Shapes(), prefix_mode="none")
    average = copy.deepcopy(host)
    host(IMAGE)
    average.forward_features(torch.zeros(1, 3, *size))  # the copy has its own memory; and not only forward counts
    host(torch.zeros(1, 3, 64, 64))
    rows, columns = (-(-side // 16) for side in size)
    assert grids[-6:] == [(4, 4)] * 2 + [(rows, columns)] * 2 + [(4, 4)] * 2


def test_dropped_tokens_are_an_error_and_not_another_grid():
    host = vit()
    saccade.swap(host, ATTENTION, "pooling", prefix_mode="none")
    with pytest.raises(SaccadeError, match="blocks.0.attn: 10 tokens are not 1 of prefix and the grid of stride 16"):
        host.blocks[0].attn(torch.randn(1, 10, 192))


def test_sites_follow_the_order_of_the_calls():
    sites = []
    saccade.swap(vit(depth=3), ATTENTION, lambda site: sites.append(site) or nn.Identity(), prefix_mode="none")
    assert sites == [saccade.Site(192, 3, 0, index, 16, (4, 4)) for index in range(3)]


def test_swapping_a_slot_again_keeps_weights_through_it():
    host = vit()
    before = host(IMAGE)
    first = saccade.swap(host, ATTENTION, "neighborhood", keep_weights=True, prefix_mode="mean")
    second = saccade.swap(host, ATTENTION, "attention", keep_weights=True)
    torch.testing.assert_close(host(IMAGE), before, rtol=0, atol=1e-5)
    with pytest.raises(SaccadeError, match="blocks.0.attn was swapped again since"):
        first.undo()
    second.undo()
    first.undo()
    assert torch.equal(host(IMAGE), before)


class Odd(nn.Module):
    """A host of maps (B, C, H, W): `part` is called as `call` says."""

    def __init__(self, part, call=lambda part, x: part(x)):
        super().__init__()
        self.stem, self.part, self.call = nn.Conv2d(3, 8, 4, 4), part, call

    def forward(self, image):
        return self.call(self.part, self.stem(image))


class Anything(nn.Module):
    def forward(self, x, more=None, causal=False):
        return x


def test_maps_channels_first_and_last_and_tuples():
    for call, layout in ((lambda part, x: part(x=x), "BCHW"), (lambda part, x: part(x.permute(0, 2, 3, 1)), "BHWC")):
        host = Odd(Anything(), call)
        saccade.swap(host, "part", "pooling", example=IMAGE)
        assert host.part.manner == Manner(layout, 0, 4)
        pooled = nn.functional.avg_pool2d(host.stem(IMAGE), 3, 1, 1, count_include_pad=False) - host.stem(IMAGE)
        out = host(IMAGE)
        torch.testing.assert_close(out if layout == "BCHW" else out.permute(0, 3, 1, 2), pooled)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    host = Odd(attention, lambda part, x: part(*[x.flatten(2).mT] * 3, need_weights=False))
    saccade.swap(host, "part", "pooling", example=IMAGE)
    out, weights = host(IMAGE)
    assert out.shape == (2, 256, 8) and weights is None


def windows(part, x):
    return part(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(0, 2).flatten(1, 2))


@pytest.mark.parametrize("part, call, message", [
    (nn.Conv2d(8, 8, 2, 2), lambda part, x: part(x), r"changes the shape \(2, 8, 16, 16\)"),
    (Anything(), windows, "sees 32 windows or groups of a batch of 2"),
    (Anything(), lambda part, x: part(x, more=x[:, :1]), "given more, and a mixer takes no mask or context"),
    (Anything(), lambda part, x: part(x, causal=True), "given causal"),
    (Anything(), lambda part, x: x, "a forward never calls it"),
    (Anything(), lambda part, x: part(part(x)[..., :8]), "one forward calls it with"),
    (Anything(), lambda part, x: part(x.flatten(2)), "no layout explains its input"),
    (nn.LSTM(8, 8, batch_first=True), lambda part, x: part(x.flatten(2).mT), "returns 2 things"),
], ids=["shape", "windows", "mask", "causal", "not called", "two shapes", "channels first tokens", "state"])
def test_what_is_not_understood_is_refused(part, call, message):
    host = Odd(part, call).train()
    with pytest.raises(SaccadeError, match=message):
        saccade.swap(host, "part", "pooling", example=IMAGE)
    assert host.part is part and part.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in host.modules())


def test_a_host_that_does_not_say_its_size_and_a_pattern_that_matches_nothing():
    with pytest.raises(SaccadeError, match="Odd does not say its image size: give example="):
        saccade.swap(Odd(Anything()), "part", "pooling")
    with pytest.raises(SaccadeError, match="did you mean blocks.1.attn, blocks.0.attn"):
        saccade.swap(vit(), "blocks.*.atn", "pooling")
    with pytest.raises(SaccadeError, match="say what the 1 prefix tokens receive"):
        saccade.swap(vit(), ATTENTION, "neighborhood")


def test_keep_weights_is_refused_at_normed_queries():
    with pytest.raises(SaccadeError, match="holds k_norm, proj, q_norm, qkv, not just"):
        saccade.swap(vit(qk_norm=True), ATTENTION, "attention", keep_weights=True)


def test_what_one_size_leaves_open_a_second_or_the_caller_tells():
    nine = {(64, 64): (1, 17 + 8, 32)}  # 4 x 4 and 9 prefix tokens, or 5 x 5 and none
    assert learn("part", nine, None, None, None) == Manner("BNC", 9, 16)  # a stride that divides comes first
    assert learn("part", nine, None, 0, None).grid((1, 25, 32), (64, 64)) == (5, 5)
    assert learn("part", nine | {(128, 64): (1, 50, 32)}, None, None, None).prefix == 0
    with pytest.raises(SaccadeError, match="more than one layout"):
        learn("part", {(64, 64): (1, 16, 16, 16)}, None, None, None)
    assert learn("part", {(64, 64): (1, 16, 16, 16)}, "BHWC", None, None) == Manner("BHWC", 0, 4)
    assert learn("part", {(64, 64): (1, 16, 16, 16), (128, 64): (1, 16, 32, 16)}, None, None, None).layout == "BCHW"
