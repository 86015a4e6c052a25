"""Vision Mamba: its mixer's symmetry, where prefix tokens stand, the authors' layout of the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, create_model
from saccade.core.keymap import rename
from saccade.golden import fill
from saccade.papers.vim import MIXER, BidirectionalMamba
from tests.contracts.registered import randomised


def test_a_reversed_sequence_with_the_directions_exchanged():
    site = Site(16, grid=(9,))
    mixer, other = randomised(BidirectionalMamba(site)).double(), BidirectionalMamba(site).double()
    names = {"forwards": "backwards", "backwards": "forwards"}
    state = {".".join(names.get(part, part) for part in name.split(".")): value
             for name, value in mixer.state_dict().items()}
    other.load_state_dict(state)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(other(x.flip(1)), mixer(x).flip(1))


def test_prefix_tokens_stand_in_the_middle():
    mixer = randomised(BidirectionalMamba(Site(16, grid=(3, 3))))
    x, prefix = torch.randn(2, 3, 3, 16), torch.randn(2, 2, 16)
    tokens = torch.cat([x.flatten(1, 2)[:, :4], prefix, x.flatten(1, 2)[:, 4:]], 1)
    whole = mixer(tokens)
    out, out_prefix = mixer(x, prefix=prefix)
    torch.testing.assert_close(out_prefix, whole[:, 4:6])
    torch.testing.assert_close(out.flatten(1, 2), torch.cat([whole[:, :4], whole[:, 6:]], 1))
    assert mixer.cost(Site(16), (3, 3), prefix=2) == mixer.cost(Site(16), (11,))


def test_the_mean_is_half_the_sum():
    site = Site(16, grid=(5,))
    mixer, total = BidirectionalMamba(site), BidirectionalMamba(site, mean=False)
    total.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(mixer(x), total(x) / 2)


def authors_state(dim=32, depth=2, tokens=64, classes=5):
    """The names and shapes of the authors' network of patches of 4 pixels."""
    inner, rank = 2 * dim, dim // 16
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens + 1, dim), "patch_embed.proj.weight": (dim, 3, 4, 4),
              "patch_embed.proj.bias": (dim,), "norm_f.weight": (dim,), "head.weight": (classes, dim),
              "head.bias": (classes,)}
    for layer in range(depth):
        at = f"layers.{layer}.mixer."
        shapes |= {f"layers.{layer}.norm.weight": (dim,), at + "in_proj.weight": (2 * inner, dim),
                   at + "out_proj.weight": (dim, inner)}
        for b in ("", "_b"):
            shapes |= {f"{at}A{b}_log": (inner, 16), f"{at}D{b}": (inner,), f"{at}conv1d{b}.weight": (inner, 1, 4),
                       f"{at}conv1d{b}.bias": (inner,), f"{at}x_proj{b}.weight": (rank + 32, inner),
                       f"{at}dt_proj{b}.weight": (inner, rank), f"{at}dt_proj{b}.bias": (inner,)}
    return {name: fill(name, shape, "param") for name, shape in shapes.items()}


def test_the_authors_layout(tmp_path):
    """Step by step from the authors' names, the class token after half of the patches, against the network."""
    state = authors_state()
    torch.save({"model": state}, tmp_path / "vim.pth")
    model = create_model("vim_nano", num_classes=5, checkpoint_path=tmp_path / "vim.pth").eval()
    assert model.load_report.format == "authors" and not model.load_report.left
    image, mixer = torch.randn(2, 3, 32, 32), BidirectionalMamba(Site(32, grid=(65,))).eval()

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    with torch.no_grad():
        x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :32], state["cls_token"].expand(2, -1, -1), x[:, 32:]], 1) + state["pos_embed"]
        for layer in range(2):
            at = f"layers.{layer}.mixer."
            own = {name.removeprefix(at): value for name, value in state.items() if name.startswith(at)}
            mixer.load_state_dict(rename(own, MIXER).state)
            x = x + mixer(rms(x, state[f"layers.{layer}.norm.weight"]))
        wanted = F.linear(rms(x, state["norm_f.weight"])[:, 32], state["head.weight"], state["head.bias"])
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-4)


def test_a_host_leaves_the_steps_at_their_start():
    """softplus of the bias lies between a thousandth and a tenth, whatever the host does to its linear layers."""
    for model in (create_model("vim_nano"), create_model("deit_nano", mixer="bidirectional_mamba")):
        steps = F.softplus(model.blocks[0].mixer.forwards.dt_proj.bias)
        assert 9e-4 < steps.min() < 0.01 < steps.max() < 0.11


def test_finer_steps():
    """Vim-Ti+ has 27 x 27 patches of 224 pixels, the class token after 364 of them; any size runs."""
    with torch.device("meta"):
        model, plain = create_model("vim_tiny_plus"), create_model("vim_tiny")
    assert model.grid == (27, 27) and model.stem(torch.empty(1, 3, 224, 224, device="meta")).shape[1:3] == (27, 27)
    count, before = (sum(value.numel() for value in each.parameters()) for each in (model, plain))
    assert count - before == (27 * 27 - 14 * 14) * 192
    nano = create_model("vim_nano", stride=2, num_classes=3).eval()
    assert nano.grid == (15, 15) and nano.feature_info.reduction() == [2, 2]
    with torch.no_grad():
        for size in ((32, 32), (3, 1), (41, 22)):
            assert nano(torch.randn(1, 3, *size)).isfinite().all()
    with pytest.raises(SaccadeError, match="stride=5"):
        create_model("vim_nano", stride=5)
