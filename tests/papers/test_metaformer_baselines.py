"""MetaFormer baselines against timm's form of them, both layouts, and random mixing, which timm has not."""

from __future__ import annotations

import re

import pytest
import torch

from saccade import Site, create_model
from saccade.core.load import load
from saccade.papers.metaformer_baselines import RandomMixing
from saccade.tools.measure import declared_macs


def authors_name(name: str) -> str:
    """What timm renamed, as the authors' `MetaFormer` names it."""
    name = re.sub(r"^stem\.norm", "downsample_layers.0.post_norm", name)
    name = re.sub(r"^stem", "downsample_layers.0", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.norm", r"downsample_layers.\1.pre_norm", name)
    name = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", name)
    name = re.sub(r"^stages\.(\d)\.blocks", r"stages.\1", name)
    return name.replace("head.norm", "norm").replace("head.fc.", "head.")


@pytest.mark.parametrize("name", ["poolformerv2_s12", "convformer_s18", "caformer_s18"])
def test_loads_both_layouts_and_equals_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases, scales and norms start as zeros and ones
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if name != "poolformerv2_s12":
        theirs.head.fc.norm.eps = 1e-5  # the authors'; timm's layer norm has another default
    image = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    state = theirs.state_dict()
    authors = {authors_name(key): value.flatten(1) if value.shape[2:] == (1, 1) else value
               for key, value in state.items()}
    for layout, entries in (("timm", state), ("authors", authors)):
        ours = create_model(name).double().eval()
        report = load(ours, entries)
        assert (report.format, report.loaded, report.left) == (layout, len(state), [])
        with torch.no_grad():
            torch.testing.assert_close(ours(image), theirs(image), rtol=1e-8, atol=1e-8)


def test_the_random_matrix_is_loaded_and_never_trained():
    model = create_model("randformer_s12")
    assert not any("mixer" in key for key, _ in model.named_parameters())
    assert model.state_dict()["stages.2.blocks.5.mixer.weight"].shape == (196, 196)
    assert model.state_dict()["stages.3.blocks.1.mixer.weight"].shape == (49, 49)
    drawn = sum(buffer.numel() for buffer in model.buffers())
    assert drawn == 6 * 196**2 + 2 * 49**2  # the paper's 0.2 M
    matrix = RandomMixing(Site(4, grid=(2, 3))).weight
    assert not matrix.requires_grad
    torch.testing.assert_close(matrix.sum(-1), torch.ones(6))


def test_random_mixing_mixes_positions():
    mixer = RandomMixing(Site(4, grid=(2, 3)))
    x = torch.randn(2, 2, 3, 4)
    for place in range(6):
        wanted = sum(mixer.weight[place, other] * x[:, other // 3, other % 3] for other in range(6))
        torch.testing.assert_close(mixer(x)[:, place // 3, place % 3], wanted)


@pytest.mark.parametrize(("name", "macs"), [
    ("identityformer_s12", 1.8e9), ("randformer_m48", 11.9e9), ("poolformerv2_s36", 5.0e9), ("convformer_s18", 3.9e9),
    ("convformer_b36", 22.6e9), ("caformer_s18", 4.1e9), ("caformer_m36", 13.2e9), ("caformer_b36_384", 72.2e9)])
def test_published_multiply_adds(name, macs):
    with torch.device("meta"):
        model = create_model(name)
        side = 384 if name.endswith("384") else 224
        assert declared_macs(model, (torch.empty(1, 3, side, side),)) == pytest.approx(macs, rel=0.02)
