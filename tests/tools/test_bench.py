from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from saccade.core.errors import SaccadeError
from saccade.tools.bench import bench, pair, table, timm_name

pytest.importorskip("timm")


def test_rows_of_models_that_take_turns() -> None:
    said: list[tuple[str, int, int]] = []
    before = torch.get_num_threads()
    rows = bench(["swin_nano", "convnext_nano"], batch=(1, 2), size=32, rounds=3, progress=lambda *a: said.append(a))
    assert [(row["model"], row["batch"]) for row in rows] == [
        ("swin_nano", 1), ("swin_nano", 2), ("convnext_nano", 1), ("convnext_nano", 2)
    ]
    for row in rows:
        assert row["throughput"] == pytest.approx(row["batch"] / row["p50"]) and 0 < row["p50"] <= row["p95"]
        assert 0 < row["floor"] < row["p95"]
        assert row["params"] > 10_000 and row["peak_memory"] > 10_000 and "ratio" not in row
    assert rows[1]["macs"] == 2 * rows[0]["macs"] > 0 and rows[1]["params"] == rows[0]["params"]
    assert said[-1] == ("swin_nano, convnext_nano, batch 2", 3, 3) and len(said) == 6
    assert json.loads(json.dumps(rows)) == rows
    assert torch.get_num_threads() == before


def test_row_beside_timm_with_the_same_weights() -> None:
    (row,) = bench(["deit_tiny_patch16_224"], against="timm", batch=[2], size=32, rounds=3)
    assert row["other"] == "timm:deit_tiny_patch16_224" and row["note"] == ""
    assert row["macs"] == 2 * (4 * 768 * 192 + 12 * (12 * 5 * 192**2 + 2 * 5**2 * 192) + 192 * 1000)
    assert row["difference"] < 1e-5
    assert row["memory_ratio"] == pytest.approx(row["peak_memory"] / row["other_peak_memory"])
    assert row["ratio"] > 0


def test_the_table_says_each_row_and_what_to_note() -> None:
    row = {"model": "a", "batch": 8, "p50": 0.5, "throughput": 16.0, "peak_memory": 3e6, "params": 2e6, "macs": 8e9,
           "floor": 0.125, "note": "weights differ"}
    raced = row | {"batch": 1, "other": "timm:b", "other_p50": 1.0, "ratio": 0.5, "memory_ratio": 0.25}
    console = Console(width=160)
    with console.capture() as shown:
        console.print(table([raced]))
    for text in ("500.0", "16.0", "3.0", "2.00", "8.000", "125.0", "1000.0", "0.50", "0.25", "a: weights differ"):
        assert text in shown.get()
    assert len(table([row]).columns) == 8


def test_timm_names() -> None:
    assert timm_name("swin_tiny") == timm_name("swin_t") == "swin_tiny_patch4_window7_224"
    assert timm_name("deit_tiny_patch16_224") == "deit_tiny_patch16_224"
    assert timm_name("swin_nano") is None


def test_what_cannot_be_compared() -> None:
    with pytest.raises(SaccadeError, match="timm has no model that is 'swin_nano'"):
        pair("swin_nano")
    with pytest.raises(SaccadeError, match="another model"):
        pair("convnext_nano", 32)
    with pytest.raises(SaccadeError, match="no model 'swim_tiny'"):
        bench(["swim_tiny"], size=32)
    with pytest.raises(SaccadeError, match="against='torchvision'"):
        bench(["swin_nano"], against="torchvision")
    with pytest.raises(SaccadeError, match="nothing to measure"):
        bench(["swin_nano"], batch=(0,))
