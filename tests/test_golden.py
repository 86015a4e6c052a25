"""Goldens are recorded, read and compared; a number that was changed is found."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.golden import (
    fill,
    make_inputs,
    make_state,
    mismatch,
    read_golden,
    record,
    summarize,
    write_golden,
)  # fmt: skip
from saccade.tools.port import verify_port
from saccade.tools.verify import verify
from tests.test_goldens import PATHS

IMAGE = {"x": {"shape": [2, 3, 32, 32], "dtype": "float32", "seed": "x"}}


class Twice(nn.Module):
    """A layer that is called under two names, a batch norm, a table; integers choose rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(3))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x, rows):
        y = self.norm(self.again(self.first(x)))
        return y[rows], y.sum()


INPUTS = {"x": {"shape": [5, 4], "dtype": "float32", "seed": "x"},
          "rows": {"shape": [3], "dtype": "int64", "seed": "rows", "low": 0, "high": 5}}


def test_what_is_recorded():
    golden = record(Twice(), INPUTS, name="twice", taps={"inner": "first"}, gradients=("x", "first.bias"))
    kinds = {name: kind for name, _, kind in golden["state"]}
    assert kinds == {"frozen": "param", "table": "kept", "first.weight": "param", "first.bias": "param",
                     "again.weight": "tied:first.weight", "again.bias": "tied:first.bias", "norm.weight": "param",
                     "norm.bias": "param", "norm.running_mean": "mean", "norm.running_var": "var",
                     "norm.num_batches_tracked": "kept"}
    assert golden["params"] == 20 + 8  # what is shared counts once, what is frozen not at all
    assert golden["macs"] == 2 * 5 * 4 * 4
    assert list(golden["outputs"]) == ["out0", "out1", "inner"] and list(golden["grads"]) == ["x", "first.bias"]
    state, inputs = make_state(golden), make_inputs(golden)
    assert set(golden["grads"]["x"]["probe"]) == {str(place) for place in range(20)}
    x = inputs["x"]
    y = (x @ state["first.weight"].T + state["first.bias"]) @ state["first.weight"].T + state["first.bias"]
    y = (y - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-5).sqrt()
    y = y * state["norm.weight"] + state["norm.bias"]
    assert mismatch(golden["outputs"]["out0"], y[inputs["rows"]]) < 1e-5
    assert mismatch(golden["outputs"]["out1"], y.sum()) < 1e-5


def test_the_values_of_a_name_are_frozen():
    """Drawn from CRC-32 and NumPy's RandomState, and scaled by kind: the same numbers on every machine, for ever."""
    matrix = np.random.RandomState(zlib.crc32(b"head.weight")).standard_normal((2, 3)) / 3**0.5
    np.testing.assert_array_equal(fill("head.weight", (2, 3), "param").numpy(), matrix.astype("float32"))
    row = np.random.RandomState(zlib.crc32(b"norm.weight")).standard_normal(4)
    np.testing.assert_array_equal(fill("norm.weight", (4,), "param").numpy(), (1 + 0.1 * row).astype("float32"))
    row = np.random.RandomState(zlib.crc32(b"norm.bias")).standard_normal(4)
    np.testing.assert_array_equal(fill("norm.bias", (4,), "param").numpy(), (0.1 * row).astype("float32"))
    assert ((fill("norm.running_var", (99,), "var") - 1).abs() <= 0.25).all()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Our narrow Swin as if it were somebody's code, written and read again."""
    path = tmp_path_factory.mktemp("goldens") / "swin_nano.json"
    model = create_model("swin_nano", img_size=32)
    golden = record(model, IMAGE, name="swin_nano", gradients=("x", "head.fc.weight"))
    write_golden(golden, path)
    assert read_golden(path) == golden
    return path


def test_what_was_recorded_of_ours_verifies(recorded):
    found = {verdict.what: verdict for verdict in verify(recorded)}
    assert set(found) == {"parameters", "out", "d/d x", "d/d head.fc.weight"}
    assert all(verdict.passed for verdict in found.values())
    assert all(verdict.passed for verdict in verify_port(lambda golden: create_model("swin_nano", img_size=32),
                                                         read_golden(recorded)))


@pytest.mark.parametrize(("part", "what"), [("outputs", "out"), ("grads", "head.fc.weight")])
def test_one_number_that_was_changed_is_found(recorded, part, what):
    golden = read_golden(recorded)
    probe = golden[part][what]["probe"]
    place = list(probe)[len(probe) // 2]
    probe[place] += 1e-3 * golden[part][what]["std"]
    failed = [verdict for verdict in verify(golden) if not verdict.passed]
    assert [verdict.what for verdict in failed] == [what if part == "outputs" else f"d/d {what}"]
    assert failed[0].error == pytest.approx(1e-3, rel=0.01)


def test_recording_a_port_of_the_authors_gives_their_golden():
    """Swin's window attention: recorded from our module through the authors' names, it is the published golden."""
    from tests.ports.swin import build

    golden = read_golden(PATHS["op_swin_window_attention"])
    port = build(golden)
    port.module.load_state_dict(port.rename(make_state(golden)))
    with torch.no_grad():
        out = port.outputs(port.module.eval()(*port.inputs(make_inputs(golden))))["out"]
    ours, theirs = summarize(out), golden["outputs"]["out"]
    assert ours["probe"].keys() == theirs["probe"].keys() and ours["shape"] == theirs["shape"]
    assert ours["probe"] == pytest.approx(theirs["probe"], abs=1e-5)
    assert [ours[key] for key in ("mean", "std", "l2")] == pytest.approx(
        [theirs[key] for key in ("mean", "std", "l2")], rel=1e-5, abs=1e-6)


def test_what_cannot_be_recorded():
    class Overflow(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(SaccadeError, match="out not finite on the drawn weights"):
        record(Overflow(), IMAGE, name="overflow")
    with pytest.raises(SaccadeError, match="gradients z: give inputs"):
        record(nn.Linear(3, 3), {"x": INPUTS["x"] | {"shape": [2, 3]}}, name="linear", gradients=("z",))
    with pytest.raises(SaccadeError, match="taps no.such: no such module of Linear"):
        record(nn.Linear(3, 3), {"x": INPUTS["x"] | {"shape": [2, 3]}}, name="linear", taps={"a": "no.such"})


def test_a_golden_is_json_that_any_reader_takes(recorded):
    golden = json.loads(recorded.read_text(), parse_constant=pytest.fail)
    assert list(golden) == list(read_golden(PATHS["swin_tiny"]))
