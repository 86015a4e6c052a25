"""Swin-MLP: its windows in loops, the authors' layout, the published multiply-adds."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model
from saccade.core.load import load
from saccade.papers.swin_mlp import ShiftedWindowMlp
from saccade.tools.measure import declared_macs


@pytest.mark.parametrize(("index", "first"), [(0, 0), (1, 2)])
def test_windows_are_mixed_by_one_matrix_a_head(index, first):
    """A shifted window of side 3 begins two tokens before the border (side 3, shift 1)."""
    torch.manual_seed(0)
    mixer = ShiftedWindowMlp(Site(4, heads=2, index=index, grid=(6, 6)), window=3).double()
    torch.nn.init.normal_(mixer.bias)
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    wanted = torch.empty_like(x)
    for row in range(6):
        for column in range(5):
            top, left = (row + first) // 3 * 3 - first, (column + first) // 3 * 3 - first
            here = (row - top) * 3 + column - left
            for channel in range(4):
                head = channel // 2
                total = mixer.bias[head * 9 + here].clone()
                for place in range(9):
                    i, j = top + place // 3, left + place % 3
                    if 0 <= i < 6 and 0 <= j < 5:
                        total += mixer.weight[head, here, place] * x[0, i, j, channel]
                wanted[0, row, column, channel] = total
    torch.testing.assert_close(mixer(x), wanted)


def test_the_authors_checkpoint_loads_whole():
    """Names and shapes of the authors' SwinMLP (models/swin_mlp.py)."""
    torch.manual_seed(0)
    dims, depths, heads, tokens = (96, 192, 384, 768), (2, 2, 6, 2), (4, 8, 16, 32), 64
    shapes = {"patch_embed.proj.weight": (96, 3, 4, 4), "patch_embed.proj.bias": (96,),
              "patch_embed.norm.weight": (96,), "patch_embed.norm.bias": (96,)}
    for stage, (dim, depth, count) in enumerate(zip(dims, depths, heads)):
        for block in range(depth):
            own = {"norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
                   "spatial_mlp.weight": (count * tokens, tokens, 1), "spatial_mlp.bias": (count * tokens,),
                   "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim),
                   "mlp.fc2.bias": (dim,)}
            shapes |= {f"layers.{stage}.blocks.{block}.{key}": shape for key, shape in own.items()}
        if stage < 3:
            shapes |= {f"layers.{stage}.downsample.reduction.weight": (2 * dim, 4 * dim),
                       f"layers.{stage}.downsample.norm.weight": (4 * dim,),
                       f"layers.{stage}.downsample.norm.bias": (4 * dim,)}
    shapes |= {"norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,)}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    model = create_model("swin_mlp_tiny_c24")
    report = load(model, state)
    assert (report.format, report.loaded, report.of, report.left) == ("authors", len(state), len(state), [])
    ours = model.stages[2].blocks[5].mixer.weight
    torch.testing.assert_close(ours[3, 7], state["layers.2.blocks.5.spatial_mlp.weight"][3 * tokens + 7, :, 0])


@pytest.mark.parametrize(("name", "macs"), [("swin_mlp_tiny_c24", 4.0e9), ("swin_mlp_tiny_c6", 4.0e9),
                                            ("swin_mlp_base", 10.4e9)])
def test_published_multiply_adds(name, macs):
    with torch.device("meta"):
        model = create_model(name)
        side = 224 if name.endswith("base") else 256
        assert declared_macs(model, (torch.empty(1, 3, side, side),)) == pytest.approx(macs, rel=0.015)
