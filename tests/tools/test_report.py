"""The page of `saccade compare`: what it says, that data stays data and, in a browser, that it works offline."""

from __future__ import annotations

import copy
import html
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from saccade.attribution.maps import as_data_uri, overlay
from saccade.core.errors import SaccadeError
from saccade.tools.report import duration, write_report
from saccade.tools.report_figures import digits, frontier, reductions, scaled, styles_of
from tests.tools.browser import needs_chromium, opened

CLASSES = [
    "barn owl", "<script>alert('class')</script>", "blue tit", "common kingfisher", "goshawk", "hoopoe", "jay", "7",
    "long-eared owl", "R&D <b>bold</b>", "sand martin", "wren",
]  # fmt: skip
#        name, kind, accuracy, parameters, MACs, latency, images a second, memory, seconds, learning rate
ENTRIES = [
    ("biformer_tiny", "model", 0.861, 13.14e6, 2.21e9, 41.2, 31.0, 211e6, 812.4, 5e-4),
    ("rmt_t", "model", 0.853, 14.3e6, 2.54e9, 38.5, 34.2, 187e6, 790.0, 5e-4),
    ("swin_tiny", "model", 0.812, 28.29e6, 4.51e9, 27.3, 48.1, 243e6, 655.1, 1e-3),
    ("nat_mini", "model", 0.835, 20.0e6, 2.73e9, 29.9, 44.0, 158e6, 690.7, 1e-3),
    ("vmamba_tiny", "model", 0.842, 30.2e6, 4.91e9, 88.0, 13.4, 402e6, 1911.3, 5e-4),
    ("evit_deit_small_keep_070", "model", 0.774, 22.1e6, 3.0e9, 15.2, 81.3, 96e6, 402.9, 1e-3),
    ("resnet18", "reference", 0.741, 11.69e6, 1.82e9, 8.6, 140.2, 61e6, 301.0, 1e-3),
]


def fake_results() -> dict[str, Any]:
    """Twelve classes, two seeds, six models and two references that finished and a model that failed."""
    draw = random.Random(0)
    contestants = [_contestant(draw, number, *entry) for number, entry in enumerate(ENTRIES)]
    failed = {key: None for key in contestants[0]} | {"name": "natten_huge", "kind": "model", "curves": [], "seeds": []}
    failed |= {"metrics": {}, "recall": {}, "confusion": [], "failed": "out of memory at batch 32 <try --batch-size 8>"}
    sentence = (
        "Take rmt_t: 85.3 % accuracy (82.9 to 87.4) at 38.5 ms; biformer_tiny (86.1 %, 41.2 ms) is indistinguishable "
        "from it and slower; biformer_tiny measured most accurate; under 19.3 ms take evit_deit_small_keep_070: "
        "77.4 % accuracy (75.0 to 79.5) at 15.2 ms."
    )
    contestants.append(_majority(contestants[0]))
    return {
        "saccade": "0.1.0",
        "command": "saccade compare './photos of birds' --models 'biformer_tiny,rmt_t' --seeds 2 --epochs 30",
        "data": {
            "name": "photos of birds", "classes": CLASSES, "counts": {"train": 1920, "val": 240, "test": 480},
            "notes": ["3 files could not be read and were left out", "split 8:1:2 by file name"],
        },
        "settings": {
            "start": "scratch", "img_size": 64, "epochs": 30, "seeds": [0, 1], "batch_size": 32,
            "learning_rates": [1e-3, 5e-4], "budget": None, "threads": 2, "latency": "onnxruntime 1.32.0, 2 threads",
        },
        "contestants": [*contestants[:3], failed, *contestants[3:]],
        "recommendation": {"best": "biformer_tiny", "tied": ["rmt_t"], "choice": "rmt_t", "sentence": sentence},
        "looks": _looks(draw),
    }  # fmt: skip


def _contestant(draw: random.Random, number: int, name: str, kind: str, top: float, *numbers: float) -> dict[str, Any]:
    params, macs, latency, throughput, memory, seconds, rate = numbers
    curves = []
    for seed in (0, 1):
        values = [top * (1 - 0.8 * 0.86 ** (epoch + number / 3)) + draw.uniform(-0.015, 0.015) for epoch in range(30)]
        losses = [2.6 * (1 - value) + 0.1 for value in values]
        curve = {"seed": seed, "epoch": list(range(1, 31)), "train_loss": losses, "val_loss": losses}
        curves.append(curve | {"val_accuracy": values})
    confusion = []
    for truth in range(12):
        row = [0] * 12
        for _ in range(80):
            right = draw.random() < top + 0.1 * (truth % 3 - 1)
            row[truth if right else (truth + draw.choice([1, 1, 1, 4, 7])) % 12] += 1
        confusion.append(row)
    return {
        "name": name, "kind": kind, "params": int(params), "macs": int(macs), "learning_rate": rate, "curves": curves,
        "seeds": [{"seed": seed, "accuracy": top, "balanced_accuracy": top, "macro_f1": top} for seed in (0, 1)],
        "metrics": {
            key: {"value": top - less, "low": top - less - 0.024, "high": top - less + 0.021}
            for key, less in (("accuracy", 0), ("balanced_accuracy", 0.006), ("macro_f1", 0.011))
        },
        "recall": {
            label: {"value": row[k] / 80, "low": max(0, row[k] / 80 - 0.09), "high": min(1, row[k] / 80 + 0.07)}
            for k, (label, row) in enumerate(zip(CLASSES, confusion, strict=True))
        },
        "confusion": confusion, "latency_ms": {"p50": latency, "p95": latency * 1.22}, "throughput": throughput,
        "peak_memory": int(memory), "training_seconds": seconds, "weights": f"weights/{name}.safetensors",
        "failed": None,
    }  # fmt: skip


def _majority(like: dict[str, Any]) -> dict[str, Any]:
    """The reference that always answers with the first class: no network, so no cost."""
    chance = {"value": 1 / 12, "low": 0.06, "high": 0.12}
    nothing = ("params", "macs", "learning_rate", "latency_ms", "throughput", "peak_memory", "training_seconds")
    return like | {key: None for key in (*nothing, "weights")} | {
        "name": "majority class", "kind": "reference", "curves": [], "confusion": [[80] + [0] * 11] * 12,
        "metrics": {key: chance for key in like["metrics"]},
        "recall": {name: chance | {"value": float(name == CLASSES[0])} for name in CLASSES},
    }  # fmt: skip


def _looks(draw: random.Random) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    images, maps = [], {entry[0]: [] for entry in ENTRIES}
    for number in range(4):
        x, y = draw.uniform(-0.5, 0.5), draw.uniform(-0.5, 0.5)
        bird = ((rows - y) ** 2 + (columns - x) ** 2 / 0.5 < 0.12).float()
        sky = torch.stack([0.45 + 0.2 * rows, 0.6 + 0.15 * rows, 0.8 - 0.2 * columns * number / 4])
        colours = sky * (1 - bird) + torch.tensor([0.7, 0.35, 0.2 + number / 8])[:, None, None] * bird
        pixels = (255 * colours.clamp(0, 1)).to(torch.uint8).permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels)
        images.append({"picture": as_data_uri(picture), "truth": CLASSES[number], "path": f"test/{number:04d}.png"})
        for name in maps:
            away_x, away_y = draw.gauss(x, 0.15), draw.gauss(y, 0.15)
            heat = torch.exp(-6 * ((rows - away_y) ** 2 + (columns - away_x) ** 2)) * torch.rand(32, 32).sqrt()
            predicted = CLASSES[number if draw.random() < 0.7 else draw.randrange(12)]
            look = {"predicted": predicted, "probability": draw.uniform(0.4, 1)}
            maps[name].append(look | {"overlay": as_data_uri(overlay(picture, heat / heat.max(), 128))})
    return {"images": images, "maps": maps}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return fake_results()


@pytest.fixture(scope="module")
def written(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_report(results, path)
    return path


def text(page: str) -> str:
    """What a reader sees of the page's own text, without scripts and styles."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", "", page, flags=re.DOTALL)))


def test_headline_says_the_advice_the_start_and_the_data(written: Path, results: dict[str, Any]) -> None:
    page = text(written.read_text(encoding="utf-8"))
    advice = page.index(results["recommendation"]["sentence"])
    start = page.index("Start: scratch, that is, the models were trained from random weights.")
    transfer = page.index("Rankings from one start do not transfer to another (finetune, probe)")
    facts = [page.index(fact) for fact in ("classes12", "training images1,920", "test images480", "3 files could not")]
    order = [advice, start, transfer, *facts, page.index("Every contestant"), page.index("Accuracy against latency")]
    order += [page.index(title) for title in ("How they learned", "Recall by class", "What rmt_t mistakes for what")]
    order += [page.index(title) for title in ("Where the models look", "Do it again", results["command"])]
    order += [page.index(method) for method in ("Each interval", "a paired bootstrap", "A sensitivity map")]
    assert order == sorted(order)


def test_table_holds_every_number(written: Path) -> None:
    page = written.read_text(encoding="utf-8")
    row = page[page.index('data-value="rmt_t"') :].partition("</tr>")[0]
    expected = ["85.3 %82.9 to 87.4", "84.7 %", "84.2 %", "14.3 M", "2.54 G", "38.5 ms", "47.0 ms", "34.2", "178 MiB"]
    cells = [text(cell).strip() for cell in re.findall(r"<td.*?</td>", row, flags=re.DOTALL)]
    assert len(cells) == 11
    for cell, number in zip(cells, [*expected, "13.2 min", "0.0005"], strict=True):
        assert cell.startswith(number), (cell, number)
    assert "recommended" in row and "tied with the best" in row
    assert page.count('<span class="badge reference">') == 2 and page.count('class="badge most accurate"') == 1
    names = re.findall(r'<th scope="row" data-value="([\w ]+)"', page)
    assert names == [*[entry[0] for entry in sorted(ENTRIES, key=lambda entry: -entry[2])], "majority class"]
    assert "natten_hugeFailed: out of memory at batch 32 <try --batch-size 8>" in text(page)


def test_data_stays_data(written: Path) -> None:
    page = written.read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<b>bold" not in page
    assert "&lt;script&gt;alert(&#39;class&#39;)&lt;/script&gt;" in page  # the page's own text
    assert "\"&lt;script&gt;alert('cl…\"" in page or "&lt;script&gt;alert('cl\\u2026" in page  # the figures' labels


def test_page_names_no_address_to_load(written: Path) -> None:
    page = written.read_text(encoding="utf-8")
    own = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", own)
    assert "default-src 'none'" in own
    assert page.count("plotly.js v") == 1 and len(page) > 3_000_000


def test_page_is_reproducible_and_replaced_at_once(results: dict[str, Any], written: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier")
    broken = copy.deepcopy(results)
    del broken["contestants"][0]["metrics"]["macro_f1"]
    with pytest.raises(KeyError):
        write_report(broken, path)
    assert path.read_text() == "earlier"
    write_report(results, path)
    assert path.read_bytes() == written.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_everybody_failed_or_little_is_known(results: dict[str, Any], tmp_path: Path) -> None:
    bare = copy.deepcopy(results)
    bare["contestants"] = [one for one in bare["contestants"] if one["failed"]]
    bare |= {"recommendation": None, "looks": None}
    write_report(bare, tmp_path / "failed.html")
    page = text((tmp_path / "failed.html").read_text(encoding="utf-8"))
    assert "No contestant finished" in page and "out of memory" in page
    assert "Where the models look" not in page and "Recall by class" not in page

    unknown = copy.deepcopy(results)
    one = unknown["contestants"][0]
    one |= {key: None for key in ("params", "macs", "latency_ms", "throughput", "peak_memory", "training_seconds")}
    one |= {"learning_rate": None, "weights": None, "curves": []}
    unknown["contestants"] = [one]
    unknown["recommendation"] = {"best": one["name"], "tied": [], "choice": one["name"], "sentence": "Take it."}
    write_report(unknown, tmp_path / "unknown.html")
    page = text((tmp_path / "unknown.html").read_text(encoding="utf-8"))
    assert "Accuracy against latency" not in page and "How they learned" not in page
    assert "Recall by class" in page
    assert "Accuracy ↓" not in page and "Latency p50" not in page and "MACs" not in page  # columns that nobody fills


def test_a_contestant_that_does_not_look_is_never_recommended(results: dict[str, Any], tmp_path: Path) -> None:
    hopeless = copy.deepcopy(results)
    sentence = "Nothing is recommended: the most accurate is indistinguishable from majority class."
    hopeless["recommendation"] |= {"choice": "majority class", "tied": ["majority class"], "sentence": sentence}
    write_report(hopeless, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'class="badge recommended"' not in page and sentence in page
    assert "What biformer_tiny mistakes for what" in page


def test_a_class_without_test_images(results: dict[str, Any], tmp_path: Path) -> None:
    lacking = copy.deepcopy(results)
    for one in lacking["contestants"]:
        if one["failed"] is None:
            del one["recall"]["wren"]
            one["confusion"][11] = [0] * 12
    write_report(lacking, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "wren taken for" not in page
    rows = re.search(r'"ticktext":(\[[^]]*\])', page[page.index('"recall-plot"', page.index("plotly.js v")) :])
    assert rows is not None and len(json.loads(rows[1])) == 11


def test_errors_say_what_is_wrong(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match="no 'settings'.*results.json"):
        write_report({"data": {}, "contestants": []}, tmp_path / "report.html")
    foreign = copy.deepcopy(results)
    foreign["looks"]["images"][1]["picture"] = "https://example.org/bird.png"
    with pytest.raises(SaccadeError, match="https://example.org/bird.png.*data:image/"):
        write_report(foreign, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_frontier_keeps_what_no_other_beats() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (4.0, 0.9), (5.0, 0.95), (1.0, 0.5)]
    assert frontier(points) == [(1.0, 0.5), (2.0, 0.7), (3.0, 0.9), (5.0, 0.95)]
    assert frontier([]) == []


def test_methods_are_lines_from_their_host_through_their_rates(results: dict[str, Any]) -> None:
    finished = [one for one in results["contestants"] if one["failed"] is None]
    styles = styles_of(finished)
    assert reductions(finished, styles) is None
    host = next(one for one in finished if one["kind"] == "model")
    rates = [host | {"name": f"{host['name']}+evit:keep={keep}", "host": host["name"], "method": f"evit:keep={keep}",
                     "latency_ms": {"p50": share * host["latency_ms"]["p50"], "p95": 1.0}}
             for keep, share in ((0.5, 0.5), (0.7, 0.9), (0.9, 1.1))]
    figure = reductions([*rates, *finished], styles_of([*rates, *finished]))
    wanted = [host["latency_ms"]["p50"] * share for share in (1, 1.1, 0.9, 0.5)]
    assert len(figure.data) == 1 and list(figure.data[0].x) == wanted
    assert list(figure.data[0].marker.symbol) == ["square", "circle", "circle", "circle"]
    assert list(figure.data[0].text) == ["", "keep=0.9", "keep=0.7", "keep=0.5"]


def test_numbers_are_written_with_three_digits() -> None:
    assert [scaled(value) for value in (0, 650, 1234, 28_288_354, 4.51e9)] == ["0", "650", "1.23 k", "28.3 M", "4.51 G"]
    assert [digits(value) for value in (0.04712, 4.7, 47, 470.4, 4704)] == ["0.0471", "4.70", "47.0", "470", "4,704"]
    assert [duration(value) for value in (9.04, 59.2, 812.4, 8100)] == ["9.04 s", "59.2 s", "13.5 min", "2.25 h"]


@pytest.mark.browser
@needs_chromium
def test_in_a_browser(written: Path) -> None:
    with opened(written) as found:
        page = found.page
        page.wait_for_selector("#confusion-plot .main-svg")

        def column(number: int) -> list[str]:
            return page.locator(f"#ranking tbody:first-of-type tr > :nth-child({number + 1})").evaluate_all(
                "cells => cells.map(cell => cell.dataset.value)"
            )

        def click(title: str) -> str | None:
            page.get_by_role("button", name=title, exact=True).click()
            return page.get_by_role("columnheader", name=title, exact=True).get_attribute("aria-sort")

        assert click("Latency p50") == "ascending"
        assert column(6) == ["8.6", "15.2", "27.3", "29.9", "38.5", "41.2", "88.0", ""]
        assert column(0)[:2] == ["resnet18", "evit_deit_small_keep_070"]
        assert click("Latency p50") == "descending"
        assert column(6)[0] == "88.0" and column(6)[-1] == ""  # what is unknown comes last, either way
        assert click("Contestant") == "ascending" and column(0) == sorted(column(0))
        assert click("Accuracy") == "descending" and column(0)[:2] == ["biformer_tiny", "rmt_t"]
        assert page.locator("[aria-sort]").count() == 1
        assert page.locator("#ranking tbody:last-of-type").inner_text().startswith("natten_huge")

        ticks = page.locator("#confusion-plot .ytick text").all_text_contents()
        assert ticks[1] == "<script>alert('cl…" and ticks[9] == "R&D <b>bold</b>"
        page.locator("#curves-plot .legendtoggle").first.click()
        page.wait_for_selector("#curves-plot .legend .traces[style*='opacity: 0.5']")  # fades once it is hidden
        assert page.evaluate("document.getElementById('curves-plot').data.map(trace => trace.visible ?? true)") == [
            *["legendonly"] * 2, *[True] * 12
        ]  # fmt: skip
        assert page.locator("#pareto-plot .errorbar").count() == 7
        page.set_viewport_size({"width": 420, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == 420
        assert found.is_calm_and_offline()
