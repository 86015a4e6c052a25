"""The cross-scan: its ways, their symmetry, other ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import Site, create_model
from saccade.core.keymap import rename
from saccade.golden import fill
from saccade.papers.vmamba import CrossScan, ordered, put_back
from saccade.parts.ssm import GRID_SCAN
from tests.contracts.registered import randomised


def test_the_four_ways():
    numbers = torch.arange(6).view(1, 2, 3, 1, 1)  # 0 1 2 / 3 4 5
    ways = ordered(numbers, shared=True)[0, :, :, 0].tolist()
    assert ways == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


@pytest.mark.parametrize("grid", [(5,), (2, 3), (4, 1), (2, 3, 4)])
def test_ways_lead_back(grid):
    x = torch.randn(2, *grid, 1, 3)
    back = put_back(ordered(x, shared=True), grid)
    torch.testing.assert_close(back, 2 * len(grid) * x.squeeze(-2))


def test_a_transposed_image_with_its_ways_exchanged():
    """Rows of the transposed image are columns of the image."""
    site = Site(8, grid=(4, 5))
    mixer, other = randomised(CrossScan(site)).double(), CrossScan(site).double()
    state = mixer.state_dict()
    exchanged = [1, 0, 3, 2]
    for name in ("x_proj.weight", "dt_bias", "A_log", "D"):
        state[name] = state[name].unflatten(0, (4, -1))[exchanged].flatten(0, 1)
    state["dt_weight"] = state["dt_weight"][exchanged]
    state["conv.weight"] = state["conv.weight"].transpose(2, 3)
    other.load_state_dict(state)
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(other(x.transpose(1, 2)), mixer(x).transpose(1, 2))


def test_sequences_and_volumes():
    for grid in [(7,), (3, 2, 4)]:
        mixer = randomised(CrossScan(Site(16, grid=grid)))
        out = mixer(torch.randn(2, *grid, 16))
        assert out.shape == (2, *grid, 16) and out.isfinite().all()


def test_no_gate_is_a_gate_of_one():
    site = Site(8, grid=(3, 4))
    plain = randomised(CrossScan(site, bias=True, gate=False)).double()
    gated = CrossScan(site, bias=True).double()
    state = plain.state_dict()
    open_gate = torch.full((16,), 1.2784645427610738, dtype=torch.float64)  # whose SiLU is 1
    state["in_proj.weight"] = torch.cat([state["in_proj.weight"], torch.zeros(16, 8, dtype=torch.float64)])
    state["in_proj.bias"] = torch.cat([state["in_proj.bias"], open_gate])
    gated.load_state_dict(state)
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(plain(x), gated(x), rtol=1e-9, atol=1e-9)
    assert plain.cost(site, (3, 4)) == gated.cost(site, (3, 4)) - 12 * 8 * 16


def authors_state(dims=(16, 32), depths=(1, 2), classes=5):
    """The names and shapes of the authors' second release, whose linear layers may be 1x1 convolutions."""
    first = dims[0]
    shapes = {"patch_embed.0.weight": (first // 2, 3, 3, 3), "patch_embed.0.bias": (first // 2,),
              "patch_embed.2.weight": (first // 2,), "patch_embed.2.bias": (first // 2,),
              "patch_embed.5.weight": (first, first // 2, 3, 3), "patch_embed.5.bias": (first,),
              "patch_embed.7.weight": (first,), "patch_embed.7.bias": (first,),
              "layers.0.downsample.1.weight": (dims[1], first, 3, 3), "layers.0.downsample.1.bias": (dims[1],),
              "layers.0.downsample.3.weight": (dims[1],), "layers.0.downsample.3.bias": (dims[1],),
              "classifier.norm.weight": (dims[1],), "classifier.norm.bias": (dims[1],),
              "classifier.head.weight": (classes, dims[1]), "classifier.head.bias": (classes,)}
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        for index in range(depth):
            at, rank = f"layers.{stage}.blocks.{index}.", -(-dim // 16)
            shapes |= {f"{at}{norm}.{what}": (dim,) for norm in ("norm", "norm2") for what in ("weight", "bias")}
            shapes |= {
                at + "op.x_proj_weight": (4, rank + 2, dim), at + "op.dt_projs_weight": (4, dim, rank),
                at + "op.dt_projs_bias": (4, dim), at + "op.A_logs": (4 * dim, 1), at + "op.Ds": (4 * dim,),
                at + "op.out_norm.weight": (dim,), at + "op.out_norm.bias": (dim,),
                at + "op.in_proj.weight": (dim, dim), at + "op.conv2d.weight": (dim, 1, 3, 3),
                at + "op.out_proj.weight": (dim, dim, 1, 1), at + "mlp.fc1.weight": (4 * dim, dim, 1, 1),
                at + "mlp.fc1.bias": (4 * dim,), at + "mlp.fc2.weight": (dim, 4 * dim), at + "mlp.fc2.bias": (dim,)}
    return {name: fill(name, shape, "param") for name, shape in shapes.items()}


def test_the_authors_layout(tmp_path):
    """Step by step from the authors' names against the network."""
    state = authors_state()
    torch.save({"model": state}, tmp_path / "vssm.pth")
    model = create_model("vmamba_nano", num_classes=5, checkpoint_path=tmp_path / "vssm.pth").eval()
    assert model.load_report.format == "authors" and not model.load_report.left
    image = torch.randn(2, 3, 24, 40)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(x, name):
        out = F.conv2d(x.movedim(-1, 1), state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1)
        return out.movedim(1, -1)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])

    with torch.no_grad():
        x = norm(conv(image.movedim(1, -1), "patch_embed.0"), "patch_embed.2")
        x = norm(conv(F.gelu(x), "patch_embed.5"), "patch_embed.7")
        for stage, depth in enumerate((1, 2)):
            for index in range(depth):
                at = f"layers.{stage}.blocks.{index}."
                mixer = CrossScan(Site(x.shape[-1], grid=(6, 10)), states=1, expand=1, conv_bias=False, gate=False)
                own = {name.removeprefix(at + "op."): value for name, value in state.items() if at + "op." in name}
                own["out_proj.weight"] = own["out_proj.weight"].flatten(1)
                mixer.load_state_dict(rename(own, GRID_SCAN).state)
                x = x + mixer(norm(x, at + "norm"))
                x = x + linear(F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
            if stage == 0:
                x = norm(conv(x, "layers.0.downsample.1"), "layers.0.downsample.3")
        wanted = linear(norm(x, "classifier.norm").mean((1, 2)), "classifier.head")
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-4)
