"""The table and the picture of the worst errors, and what the checked-in ones say."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from saccade.tools.errors import Worst, measure, page, picture
from tests.test_goldens import CLAIMED

DOCS = Path(__file__).parents[2] / "docs"
ROWS = [Worst("swin_tiny", "swin", True, "out", 2e-6, 1e-4, 9), Worst("op_a<b", "swin", False, "d/d x", 0.0, 1e-3, 2),
        Worst("van_b0", "van", True, "out", 3e-4, 1e-3, 3)]
SVG = "{http://www.w3.org/2000/svg}"


def test_an_operator_and_a_golden_with_a_wrong_number():
    row = measure("op_swin_window_attention", "swin")
    assert not row.model and row.error <= 1e-5 and row.tolerance == 1e-4
    wrong = measure("op_rgt_lsa_shift", "rgt")  # one of its gradients is rounding: tests/contracts/exceptions.toml
    assert wrong.error <= wrong.tolerance and wrong.what != "d/d attns.0.pos.pos3.2.weight"


def test_the_table_has_the_worst_first():
    goldens = re.findall(r"^\| (\S+) \| \[", page(ROWS), re.M)
    assert goldens == ["van_b0", "swin_tiny", "op_a<b"]
    assert "2 models and 1 operators" in page(ROWS) and "14 outputs" in page(ROWS)
    assert "The median is 2.0e-06, and 1 agree to the last" in page(ROWS)


def test_the_picture_places_errors_by_their_power():
    root = ElementTree.fromstring(picture(ROWS))
    points = [circle for circle in root.iter(f"{SVG}circle") if circle.find(f"{SVG}title") is not None]
    assert [point.find(f"{SVG}title").text.split(":")[0] for point in points] == ["op_a<b", "swin_tiny", "van_b0"]
    exact, small, large = (float(point.get("cy")) for point in points)
    lines = {text.text: float(text.get("y")) - 4 for text in root.iter(f"{SVG}text") if text.text}
    assert lines["1e-5"] > large > lines["1e-3"] and lines["1e-6"] > small > lines["1e-5"]
    assert exact > lines["1e-7"]
    assert "prefers-color-scheme: dark" in picture(ROWS)


def test_the_pages_numbers_are_within_tolerance():
    rows = re.findall(r"^\| (\S+) \| \[(\w+)\]\S+ \| (\S+) \| .* \| (\S+) \|$", (DOCS / "errors.md").read_text(), re.M)
    assert len(rows) > 300
    for golden, paper, error, tolerance in rows:
        assert CLAIMED[golden] == paper and float(error) <= float(tolerance)
