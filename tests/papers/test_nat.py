"""Isotropic NAT, DiNAT and ViT-rpb: the authors' layout, the order of their offsets, the published multiply-adds."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model
from saccade.core.load import load
from saccade.papers.nat import RelativeAttention
from saccade.tools.measure import declared_macs

ISOTROPIC = ("nat_isotropic_small", "dinat_isotropic_small", "vitrpb_small")


def checkpoint(name: str, dim: int = 384, heads: int = 12, depth: int = 12) -> dict[str, torch.Tensor]:
    """A state with the names and shapes of the authors' NATIsotropic (classification/isotropic.py), drawn at random."""
    glob = name.startswith("vitrpb")
    shapes = {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,),
              "patch_embed.norm.weight": (dim,), "patch_embed.norm.bias": (dim,)}
    for block in range(depth):
        layers = {"norm1.weight": (dim,), "norm1.bias": (dim,), "attn.rpb": (heads, *[27 if glob else 13] * 2),
                  "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim),
                  "attn.proj.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
                  "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim),
                  "mlp.fc2.bias": (dim,)}
        shapes |= {f"layers.{block}.{key}": shape for key, shape in layers.items()}
        if glob:
            shapes[f"layers.{block}.attn.relative_position_index"] = (196, 196)
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (1000, dim), "head.bias": (1000,)}
    return {key: torch.randn(shape) / 10 for key, shape in shapes.items()}


@pytest.mark.parametrize("name", ISOTROPIC)
def test_the_authors_isotropic_checkpoints_load_whole(name):
    torch.manual_seed(0)
    state = checkpoint(name)
    model = create_model(name)
    report = load(model, state)
    dropped = {key for key in state if key.endswith("relative_position_index")}
    assert (report.format, report.loaded, report.left, report.resized) == ("authors", report.of, [], [])
    assert report.loaded == len(state) - len(dropped) and set(report.dropped) == dropped
    ours = model.state_dict()
    torch.testing.assert_close(ours["blocks.11.mixer.bias"], state["layers.11.attn.rpb"])
    torch.testing.assert_close(ours["blocks.3.mlp.fc2.weight"], state["layers.3.mlp.fc2.weight"])
    torch.testing.assert_close(ours["head.bias"], state["head.bias"])


def test_every_second_block_is_dilated():
    blocks = create_model("dinat_isotropic_nano").blocks
    assert [block.mixer.dilation for block in blocks] == [1, 2, 1, 2]
    assert {block.mixer.dilation for block in create_model("nat_isotropic_nano").blocks} == {1}


@pytest.mark.parametrize(("name", "macs"), [("nat_isotropic_small", 4.3e9), ("dinat_isotropic_base", 16.9e9),
                                            ("vitrpb_small", 4.6e9), ("vitrpb_base", 17.5e9)])
def test_published_multiply_adds(name, macs):
    with torch.device("meta"):
        model = create_model(name)
        assert declared_macs(model, (torch.empty(1, 3, 224, 224),)) == pytest.approx(macs, rel=0.015)


def test_relative_attention_adds_the_entry_of_key_minus_query():
    """As NAT counts its offsets; the authors' ViT-rpb flips Swin's index on both axes to that end."""
    torch.manual_seed(0)
    mixer = RelativeAttention(Site(8, heads=2, grid=(3, 4))).double()
    torch.nn.init.normal_(mixer.bias)
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).view(12, 3, 2, 4).permute(1, 2, 0, 3)
    out = torch.empty(12, 2, 4, dtype=torch.float64)
    for head in range(2):
        for query in range(12):
            logits = torch.stack([
                q[head, query] @ k[head, key] / 2
                + mixer.bias[head, key // 4 - query // 4 + 2, key % 4 - query % 4 + 3]
                for key in range(12)
            ])
            out[query, head] = logits.softmax(0) @ v[head]
    torch.testing.assert_close(mixer(x), mixer.proj(out.view(1, 3, 4, 8)))
