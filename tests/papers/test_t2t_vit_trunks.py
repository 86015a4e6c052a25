"""The trunks of T2T-ViT against their definitions."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model
from saccade.papers.t2t_vit_trunks import GhostAttention, GhostMlp, SqueezedAttention
from saccade.parts.attention import Attention
from saccade.tools.measure import declared_macs


def test_ghost_attention_is_attention_with_tied_rows():
    torch.manual_seed(0)
    ghost, plain = GhostAttention(Site(12, 3)).double(), Attention(Site(12, 3), qkv_bias=False).double()
    torch.nn.init.normal_(ghost.copies)
    with torch.no_grad():
        half = ghost.qkv.weight.view(3, 6, 12)
        plain.qkv.weight.copy_(torch.cat([half, half * ghost.copies[..., None]], 1).view(36, 12))
        plain.proj.load_state_dict(ghost.proj.state_dict())
        x, prefix = torch.randn(2, 3, 5, 12, dtype=torch.float64), torch.randn(2, 1, 12, dtype=torch.float64)
        for got, wanted in zip(ghost(x, prefix), plain(x, prefix)):
            torch.testing.assert_close(got, wanted)


def test_ghost_mlp_is_an_mlp_with_tied_units():
    torch.manual_seed(0)
    mlp, x = GhostMlp(4).double(), torch.randn(3, 4, dtype=torch.float64)
    torch.nn.init.normal_(mlp.copies)
    gelu = torch.nn.functional.gelu
    hidden = [gelu(mlp.fc1(x))]
    hidden += [gelu(hidden[0] * copy) for copy in mlp.copies]
    torch.testing.assert_close(mlp(x), torch.cat(hidden, -1) @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_the_class_token_is_squeezed_too():
    torch.manual_seed(0)
    mixer = SqueezedAttention(Site(32, 2)).eval()
    x, prefix = torch.randn(1, 2, 3, 32), torch.randn(1, 1, 32)
    grid, token = Attention.forward(mixer, x, prefix)
    mean = torch.cat([token, grid.flatten(1, 2)], 1).mean(1)
    gate = (mixer.squeeze.fc1.weight @ mean[0]).relu()
    gate = (mixer.squeeze.fc2.weight @ gate).sigmoid()
    got_grid, got_token = mixer(x, prefix)
    torch.testing.assert_close(got_grid, grid * gate)
    torch.testing.assert_close(got_token, token * gate)


def test_the_dense_trunk_grows_and_halves():
    model = create_model("t2t_vit_dense_nano")
    assert model.feature_info.channels() == [48, 24, 40, 56] and model.num_features == 56
    rates = [block.scale1[0].rate for block in create_model("t2t_vit_dense_nano", drop_path_rate=0.11).blocks
             if hasattr(block, "scale1") and len(list(block.scale1.children()))]
    assert rates == pytest.approx([0.01, 0.01])


# Counted on the authors' code.
@pytest.mark.parametrize("name, params, macs", [
    ("t2t_vit_14_se", 21_723_854, 4_783_726_592), ("t2t_vit_16_ghost", 16_173_518, 3_801_557_504),
    ("t2t_vit_dense", 23_617_750, 5_276_107_968),
])
def test_size_of_the_authors_models(name, params, macs):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    assert declared_macs(model, (image,)) == pytest.approx(macs, rel=0.01)
