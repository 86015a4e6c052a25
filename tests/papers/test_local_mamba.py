"""LocalMamba's orders: which tokens come when, and the way back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, create_model
from saccade.core.keymap import rename
from saccade.golden import fill
from saccade.papers.local_mamba import (
    CARD,
    CROSS_SCAN,
    SIZES,
    LocalCrossScan,
    LocalMamba,
    Order,
    mixer_names,
    rotations,
)
from saccade.tools.measure import declared_macs
from tests.contracts.registered import randomised


@pytest.mark.parametrize("name, wanted", [
    ("h", [1, 2, 3, 4, 5, 6]),
    ("h_flip", [6, 5, 4, 3, 2, 1]),
    ("v", [1, 4, 2, 5, 3, 6]),
    ("v_flip", [6, 3, 5, 2, 4, 1]),
    ("w2", [1, 2, 4, 5, 3, 0, 6, 0]),
    ("w2_flip", [0, 6, 0, 3, 5, 4, 2, 1]),
])
def test_orders(name, wanted):
    x = torch.tensor([[1, 2, 3], [4, 5, 6]]).view(1, 2, 3, 1)
    assert Order(name).line(x).flatten().tolist() == wanted


@pytest.mark.parametrize("name", ["h", "v", "w2", "w7", "h_flip", "v_flip", "w3_flip"])
@pytest.mark.parametrize("grid", [(5,), (4, 4), (5, 3), (2, 3, 4)])
def test_the_way_back(name, grid):
    x = torch.randn(2, *grid, 3)
    torch.testing.assert_close(Order(name).back(Order(name).line(x), grid), x)


def test_prefix_tokens_are_seen_and_see():
    mixer = randomised(LocalMamba(Site(16, grid=(4, 6)))).double()
    x, prefix = (torch.randn(1, *shape, 16, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (2,)))
    out, out_prefix = mixer(x, prefix=prefix)
    assert out.shape == x.shape and out_prefix.shape == prefix.shape
    seen, = torch.autograd.grad(out.sum(), prefix, retain_graph=True)
    sees, = torch.autograd.grad(out_prefix.sum(), x)
    assert (seen.abs().amax(-1) > 0).all() and (sees.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", ["", "w", "w0", "x2", "h_flop"])
def test_an_order_that_is_not_known(name):
    with pytest.raises(SaccadeError, match="no order"):
        LocalMamba(Site(16), [name])


def test_turns_in_loops():
    """Pairs of the first half by the row, of the second by the column, on a side of 14."""
    table = rotations((3, 5), 12, torch.float64, torch.device("cpu"))[0]
    for row in range(3):
        for column in range(5):
            angles = [place * 10000 ** (-2 * pair / 6) for place in (row / 3 * 14, column / 5 * 14)
                      for pair in range(3)]
            angles = torch.tensor(angles, dtype=torch.float64)
            wanted = torch.cat([angles.cos(), angles.sin()])
            torch.testing.assert_close(table[row, column], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(SaccadeError, match="10 channels on 2 axes"):
        rotations((3, 5), 10, torch.float32, torch.device("cpu"))


def authors_state(dim=32, tokens=64, classes=5):
    """The names and shapes of the authors' LocalVim of two layers and patches of 4 pixels."""
    inner, rank = 2 * dim, dim // 16
    shapes = {"pos_embed": (1, tokens, dim), "patch_embed.proj.weight": (dim, 3, 4, 4), "patch_embed.proj.bias": (dim,),
              "rope.freqs_cos": (tokens, dim), "rope.freqs_sin": (tokens, dim), "norm_f.weight": (dim,),
              "head.weight": (classes, dim), "head.bias": (classes,)}
    for layer in range(2):
        at = f"layers.{layer}.mixer."
        shapes |= {f"layers.{layer}.norm.weight": (dim,), at + "in_proj.weight": (2 * inner, dim),
                   at + "out_proj.weight": (dim, inner),
                   at + "attn.norm.weight": (inner,), at + "attn.norm.bias": (inner,),
                   at + "attn.global_reduce.weight": (inner // 8, inner), at + "attn.global_reduce.bias": (inner // 8,),
                   at + "attn.channel_select.weight": (inner, inner // 8), at + "attn.channel_select.bias": (inner,)}
        for n in range(4):
            shapes |= {f"{at}A_log_{n}": (inner, 16), f"{at}D_{n}": (inner,), f"{at}conv1d_{n}.weight": (inner, 1, 4),
                       f"{at}conv1d_{n}.bias": (inner,), f"{at}x_proj_{n}.weight": (rank + 32, inner),
                       f"{at}dt_proj_{n}.weight": (inner, rank), f"{at}dt_proj_{n}.bias": (inner,)}
    return {name: fill(name, shape, "param") for name, shape in shapes.items()}


def test_the_authors_layout(tmp_path):
    """Step by step from the authors' names, all channels turned before every layer, against the network."""
    state = authors_state()
    torch.save({"state_dict": state}, tmp_path / "local_vim.ckpt")
    model = create_model("local_vim_nano", num_classes=5, checkpoint_path=tmp_path / "local_vim.ckpt").eval()
    assert model.load_report.format == "authors" and not model.load_report.left
    image, orders = torch.randn(2, 3, 32, 32), SIZES["local_vim_nano"]["orders"]
    half = torch.arange(8) / 8 * 14 * 10000 ** (-torch.arange(0, 16, 2) / 16)[:, None]  # (8 pairs, 8 places)
    angle = torch.cat([half.T[:, None].expand(8, 8, -1), half.T[None].expand(8, 8, -1)], -1)  # rows, then columns
    cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    with torch.no_grad():
        x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
        x = x.movedim(1, -1) + state["pos_embed"].view(1, 8, 8, 32)
        for layer in range(2):
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            x = x * cos + turned * sin
            mixer, at = LocalMamba(Site(32, grid=(8, 8)), orders[layer]).eval(), f"layers.{layer}.mixer."
            own = {name.removeprefix(at): value for name, value in state.items() if name.startswith(at)}
            mixer.load_state_dict(rename(own, mixer_names(4)).state)
            x = x + mixer(rms(x, state[f"layers.{layer}.norm.weight"]))
        wanted = F.linear(rms(x, state["norm_f.weight"]).mean((1, 2)), state["head.weight"], state["head.bias"])
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-4)


def test_published_orders():
    tiny = SIZES["local_vim_tiny"]["orders"]
    assert len(tiny) == 20 and all(len(layer) == 4 for layer in tiny)
    assert tiny[0] == ("h", "v_flip", "w7", "w7_flip") and tiny[-1] == ("v", "v_flip", "w2", "w2_flip")


def pyramid_state(dims=(16, 32), depths=(1, 2), classes=5):
    """The names and shapes of the authors' LocalVMamba."""
    first = dims[0]
    shapes = {"patch_embed.0.weight": (first, 3, 2, 2), "patch_embed.0.bias": (first,),
              "patch_embed.2.weight": (first,), "patch_embed.2.bias": (first,),
              "layers.0.downsample.norm.weight": (4 * first,), "layers.0.downsample.norm.bias": (4 * first,),
              "layers.0.downsample.reduction.weight": (dims[1], 4 * first),
              "classifier.norm.weight": (dims[1],), "classifier.norm.bias": (dims[1],),
              "classifier.head.weight": (classes, dims[1]), "classifier.head.bias": (classes,)}
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        inner, rank = 2 * dim, -(-dim // 16)
        for index in range(depth):
            at = f"layers.{stage}.blocks.{index}."
            gate = at + "op.multi_scan.attn."
            shapes |= {at + "norm.weight": (dim,), at + "norm.bias": (dim,),
                       at + "op.x_proj_weight": (4, rank + 32, inner), at + "op.dt_projs_weight": (4, inner, rank),
                       at + "op.dt_projs_bias": (4, inner), at + "op.A_logs": (4 * inner, 16),
                       at + "op.Ds": (4 * inner,),
                       at + "op.out_norm.weight": (inner,), at + "op.out_norm.bias": (inner,),
                       at + "op.in_proj.weight": (2 * inner, dim), at + "op.conv2d.weight": (inner, 1, 3, 3),
                       at + "op.conv2d.bias": (inner,), at + "op.out_proj.weight": (dim, inner),
                       gate + "norm.weight": (inner,), gate + "norm.bias": (inner,),
                       gate + "global_reduce.weight": (inner // 8, inner), gate + "global_reduce.bias": (inner // 8,),
                       gate + "channel_select.weight": (inner, inner // 8), gate + "channel_select.bias": (inner,)}
    return {name: fill(name, shape, "param") for name, shape in shapes.items()}


def test_the_authors_pyramid(tmp_path):
    """Step by step from the authors' names against the network."""
    state = pyramid_state()
    torch.save({"state_dict": state}, tmp_path / "local_vssm.ckpt")
    model = create_model("local_vssm_nano", num_classes=5, checkpoint_path=tmp_path / "local_vssm.ckpt").eval()
    assert model.load_report.format == "authors" and not model.load_report.left
    image, orders = torch.randn(2, 3, 12, 20), iter(SIZES["local_vssm_nano"]["orders"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    with torch.no_grad():
        x = F.conv2d(image, state["patch_embed.0.weight"], state["patch_embed.0.bias"], stride=2).movedim(1, -1)
        x = norm(x, "patch_embed.2")
        for stage, depth in enumerate((1, 2)):
            for index in range(depth):
                at = f"layers.{stage}.blocks.{index}."
                mixer = LocalCrossScan(Site(x.shape[-1], grid=(6, 10)), next(orders))
                own = {name.removeprefix(at + "op."): value for name, value in state.items() if at + "op." in name}
                mixer.load_state_dict(rename(own, CROSS_SCAN).state)
                x = x + mixer(norm(x, at + "norm"))
            if stage == 0:
                x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
                x = F.linear(norm(x, "layers.0.downsample.norm"), state["layers.0.downsample.reduction.weight"])
        wanted = F.linear(norm(x, "classifier.norm").mean((1, 2)), state["classifier.head.weight"],
                          state["classifier.head.bias"])
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["local_vssm_tiny", "local_vssm_small"])
def test_pyramids_of_the_paper(name):
    """Parameters in millions; multiply-adds as the authors count: 9 L E n + L E for a scan, 5 for a norm's entry."""
    model = create_model(name)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == CARD.params[name] / 1e6
    macs = declared_macs(model, (torch.empty(1, 3, 224, 224),))
    for stage in model.stages:
        for block in stage.blocks:
            (ways, inner, rank), states, grid = block.mixer.dt_weight.shape, block.mixer.split[1], block.site.grid
            longest = max(order.length(grid) for order in block.mixer.orders)  # theirs are all padded to it
            macs += (longest * ways - block.mixer.scanned_tokens(grid)) * inner * (rank + states)
            macs += longest * ways * inner * (8 * states + 1)  # the readout, L E n, is declared
            macs += 5 * block.site.grid[0] * block.site.grid[1] * (block.site.dim + (ways + 1) * inner)
    assert macs == pytest.approx(CARD.macs[name], rel=0.01)
