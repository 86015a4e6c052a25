"""Mixers against the number of tokens: shapes, exponents, what is left out, what the command says."""

from __future__ import annotations

import json

import pytest

from saccade import SaccadeError
from saccade.tools.lengths import exponent, lengths, markdown, plot, sides
from tests.test_cli import run


def test_grids_are_as_square_as_may_be():
    assert [sides(n) for n in (196, 3136, 12, 7)] == [(14, 14), (56, 56), (3, 4), (1, 7)]


def test_exponents():
    assert exponent({10: 1.0, 100: 10.0, 1000: 1000.0}) == pytest.approx(2)
    assert exponent({10: 1.0}) is None and exponent({10: 0.0, 20: 0.0}) is None


def test_rows_and_pages(tmp_path):
    rows = lengths(["pooling", "attention"], [64, 256], rounds=1)
    assert [row["mixer"] for row in rows] == ["pooling", "attention"]
    assert all(set(row["seconds"]) == set(row["bytes"]) == {64, 256} for row in rows)
    assert rows[1]["bytes"][256] > rows[1]["bytes"][64] > 64 * 64 * 4
    assert markdown(rows, [64, 256]).count("\n") == 3
    plot(rows, tmp_path / "plot.html")
    text = (tmp_path / "plot.html").read_text(encoding="utf-8")
    assert "pooling" in text and "src=\"http" not in text
    assert len(lengths(["attention"], [64, 256, 1024], rounds=1, limit=0.0)[0]["seconds"]) == 1


def test_command(capsys):
    code, out, _ = run(capsys, "bench", "--mixers", "identity,window", "--tokens", "49,196", "--rounds", "1", "--json")
    assert code == 0 and [row["mixer"] for row in json.loads(out)] == ["identity", "window"]
    code, _, errors = run(capsys, "bench", "swin_nano", "--mixers", "window")
    assert code == 2 and "--mixers" in errors


def test_bad_input():
    with pytest.raises(SaccadeError, match="there is no mixer 'windw'"):
        lengths(["windw"], [64, 256])
    with pytest.raises(SaccadeError, match="the smaller first"):
        lengths(["window"], [256, 64])
