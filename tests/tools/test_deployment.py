"""The page that says how every backbone ships, and what it is made of."""

from __future__ import annotations

import pytest
import torch

from saccade import create_model
from saccade.tools import deployment
from saccade.tools.export import int8
from saccade.tools.matrix import hosts
from saccade.tools.pages import page, recorded


def rows() -> dict[str, dict[str, str]]:
    return recorded(deployment.PAGE.read_text(encoding="utf-8"))


def test_a_page_gives_back_its_table():
    """Long cells stand beneath it, each once."""
    table = {"a": {"x": "✓", "y": "why it failed"}, "b": {"x": "why it failed", "y": "2e-07"},
             "c": {"x": "another reason. Or two", "y": "0.5"}}
    text = page("Title", "What it tells.", ["x", "y"], table)
    assert recorded(text) == table and text.count("why it failed") == 1 and "| b | [1] | 2e-07 |" in text


def test_the_page_is_what_its_tool_writes():
    assert set(rows()) == set(hosts()) and all(list(cells) == list(deployment.TRIALS) for cells in rows().values())
    assert deployment.PAGE.read_text(encoding="utf-8") == deployment.deployment(rows())


@pytest.mark.parametrize("trial", ["compile", "export"])
def test_nine_in_ten_ship(trial):
    cells = [found[trial] for found in rows().values()]
    assert cells.count(deployment.YES) >= 0.9 * len(cells)


def test_trials_of_a_model():
    """Values of one row: equal programs, small drifts, linear layers at a quarter of their size."""
    model = deployment.drawn("convnext_nano")
    with torch.no_grad():
        assert deployment.compiled(model) == deployment.channels_last(model) == deployment.YES
        assert 1e-4 < float(deployment.bfloat16(model)) < 0.1


def test_int8_is_a_smaller_copy():
    pytest.importorskip("torchao")
    model, image = create_model("deit_nano", num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before, after = model(image), int8(model)(image)
        assert torch.equal(model(image), before)
    assert 0 < (after - before).abs().max() / before.abs().max() < 0.1
    assert float(deployment.int8_size(model)) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("host", rows())
def test_the_page_is_true(host):
    """A family that compiles, exports and runs in onnxruntime still does."""
    found, said = deployment.row(host), rows()[host]
    assert {title: " " in found[title] for title in ("compile", "export", "ONNX")} == {
        title: " " in said[title] for title in ("compile", "export", "ONNX")}
