"""Attention as a page keeps it: the recorded weights, between the right places, within a budget."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch

from saccade import create_model, record
from saccade.core.record import Affinity, Part
from saccade.tools.explain_attention import Layer, layers, packed
from tests.integrations.test_hosts import SWINS

KINDS = {"u1": np.uint8, "i2": np.int16, "f4": np.float32}


def decoded(text: str, kind: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), KINDS[kind]).reshape(shape or -1)


def laid(layer: dict[str, Any]) -> np.ndarray:
    """The dense map that the page's numbers stand for, (heads, tokens, tokens)."""
    tokens = layer["prefix"] + layer["rows"] * layer["columns"]
    out = np.zeros((layer["parts"][0]["heads"], tokens, tokens))
    for part in layer["parts"]:
        groups, heads, rows, columns = (part[key] for key in ("groups", "heads", "rows", "columns"))
        weights = decoded(part["weights"], "u1", groups, heads, rows, columns) / 255.0
        weights = weights * decoded(part["peaks"], "f4", groups, heads, rows, 1)
        query, key = decoded(part["query"], "i2", groups, rows), decoded(part["key"], "i2", groups, columns)
        for group in range(groups):
            for row, asks in enumerate(query[group]):
                for column, seen in enumerate(key[group]):
                    if asks >= 0 and seen >= 0:
                        out[:, asks, seen] += weights[group, :, row, column]
    return out


@pytest.mark.parametrize("name", ["deit_nano", "swin_nano", "biformer_nano", "nat_nano", "pvt_v2_nano"])
def test_attention_of_the_page_is_the_recorded_one(name: str) -> None:
    torch.manual_seed(0)
    model, image = create_model(name, num_classes=3).eval(), torch.randn(1, 3, 48, 32)
    with record(model) as recorded, torch.no_grad():
        model(image)
    found, loose = layers(model, recorded.affinities, (48, 32))
    plain, lines = packed(found, 2**22)
    assert [layer["name"] for layer in plain] == recorded.keys() and loose == lines == []
    for layer in plain:
        dense, page = recorded[layer["name"]].dense()[0].numpy(), laid(layer)
        shown = page[:, : dense.shape[1], : dense.shape[2]]
        assert np.abs(shown - dense).max() <= 0.5 / 255 * dense.max() + 1e-6
        assert page.sum() == pytest.approx(shown.sum())  # tokens beyond the recorded ones have nothing
        assert layer["rows"] * 2 == layer["columns"] * 3 and layer["prefix"] == (name == "deit_nano")


def test_pooled_tokens_stand_for_their_neighbours() -> None:
    weights = torch.rand(1, 1, 16, 4).softmax(-1)
    part = Part(weights, torch.arange(16)[None], torch.tensor([[0, 2, 8, 10]]))
    (layer,), _ = packed(layers(torch.nn.Module(), {"pooled": Affinity([part])}, (16, 16))[0], 10**6)
    near = decoded(layer["nearest"], "i2", 4, 4)
    assert set(near.ravel()) == {0, 2, 8, 10} and near[0, 0] == near[1, 0] == 0 and near[3, 3] == 10
    routed = Part(weights[..., :3], torch.arange(16)[None], torch.tensor([[0, 2, 8]]))  # 10 was never chosen
    (layer,), _ = packed(layers(torch.nn.Module(), {"routed": Affinity([routed])}, (16, 16))[0], 10**6)
    assert (decoded(layer["nearest"], "i2", 4, 4) == near).all()
    unpooled = Part(weights, torch.arange(16)[None], torch.tensor([[0, 1, 4, 5]]))
    (layer,), _ = packed(layers(torch.nn.Module(), {"unpooled": Affinity([unpooled])}, (16, 16))[0], 10**6)
    assert layer["nearest"] is None
    foreign = Part(weights, None, None)
    (layer,), lines = packed(layers(torch.nn.Module(), {"pvt": Affinity([foreign])}, (16, 16))[0], 10**6)
    assert lines == [] and set(decoded(layer["parts"][0]["key"], "i2")) == {5, 7, 13, 15}


@pytest.mark.parametrize("name", SWINS)
def test_windows_of_hosts_lie_where_a_token_has_an_effect(name: str) -> None:
    """A token changes exactly those that attend to it; the block is shifted, torchvision's map is padded too."""
    torch.manual_seed(0)
    host = SWINS[name][0]().eval()
    block = {"timm Swin": "layers.0.blocks.1", "torchvision Swin": "features.1.1",
             "transformers Swin": "swin.encoder.layers.0.blocks.1"}[name]
    height, width = (60, 52) if name == "torchvision Swin" else (64, 64)
    image = torch.randn(1, 3, height, width)
    with record(host, f"{block}.*") as recorded, torch.no_grad():
        host(image)
    (layer,), loose = layers(host, recorded.affinities, (height, width))
    assert loose == [] and layer.grid == (height // 4, width // 4) and layer.prefix == 0
    dense = Affinity(layer.parts).dense()[0].mean(0)
    for token in (0, 37, 18, height * width // 16 - 1):
        before, after = (effect(host, block, image, place) for place in (None, token))
        changed = (before - after).abs().amax(-1) > 1e-7
        assert torch.equal(changed, dense[:, token] > 1e-6), token


def effect(host: torch.nn.Module, block: str, image: torch.Tensor, token: int | None) -> torch.Tensor:
    """What a block gives, (tokens, C), where one of the tokens that it is given is changed."""
    seen: list[torch.Tensor] = []

    def change(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].clone()
        if token is not None:
            x.view(-1, x.shape[-1])[token] += torch.linspace(-1, 1, x.shape[-1])
        return (x, *inputs[1:])

    module = host.get_submodule(block)
    hooks = [module.register_forward_pre_hook(change), module.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output))]
    with torch.no_grad():
        host(image)
    for hook in hooks:
        hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_what_does_not_fit_is_told() -> None:
    def layer(name: str, heads: int, tokens: int) -> Layer:
        ids = torch.arange(tokens)[None]
        return Layer(name, [Part(torch.rand(1, heads, tokens, tokens).softmax(-1), ids, ids)], 0, (1, tokens))

    found = [layer("small", 4, 16), layer("many heads", 16, 64), layer("huge", 1, 512)]
    plain, lines = packed(found, 40_000)
    assert [(one["name"], one["mean"]) for one in plain] == [("small", False), ("many heads", True)]
    assert np.allclose(laid(plain[1])[0], found[1].parts[0].weights[0].mean(0), atol=1e-3)
    assert lines == ["many heads: the mean of the heads alone, to keep the page small.",
                     "huge: too many weights for a page."]
    assert sum(len(part["weights"]) for one in plain for part in one["parts"]) < 40_000 * 4 / 3
    many = torch.arange(64)[None]
    few = Part(torch.rand(1, 2, 40, 40), many[:, 5:45], many[:, 5:45])  # where tokens were dropped, the last too
    whole = Part(torch.rand(1, 2, 64, 64), many, many)
    found, _ = layers(torch.nn.Module(), {"whole": Affinity([whole]), "few": Affinity([few])}, (32, 32))
    assert [(one.prefix, one.grid) for one in found] == [(0, (8, 8))] * 2
    channels = Affinity([Part(torch.rand(1, 2, 7, 7), None, None)])
    none, lines = layers(torch.nn.Sequential(torch.nn.Identity()), {"0": channels}, (32, 32))
    assert none == [] and lines[0].startswith("0: weights that do not stand between places")
