"""`saccade explain`: the numbers on its page, whose models it opens, bad input, and the page in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import Markup
from PIL import Image
from safetensors.torch import save_file

import saccade
from saccade import SaccadeError, create_model, explain
from saccade.learn.pictures import read_image
from saccade.tools.classifiers import open_classifier
from saccade.tools.explain import Question, chosen_methods, collect, levels, parsed_method, write_page
from saccade.tools.render import render
from tests.attribution.planted import pictures as planted
from tests.attribution.planted import trained
from tests.test_cli import run
from tests.tools.browser import needs_chromium, opened
from tests.tools.test_explain_attention import decoded, laid

FAST = ("gradcam", "gradient", "occlusion", "integrated_gradients")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with a planted patch, named by their class, and a run that learned to see it."""
    root = tmp_path_factory.mktemp("explain")
    image, label, _ = planted(4, seed=0)
    for number, (one, right) in enumerate(zip(image, label, strict=True)):
        pixels = ((one.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"{number}-{right}.png")
    card = {"model": "deit_nano", "options": {"num_classes": 2, "img_size": 32}, "classes": ["lying <b>", "standing"],
            "mean": [0.5] * 3, "std": [0.5] * 3}
    (root / "run").mkdir()
    (root / "run" / "model.json").write_text(json.dumps(card))
    save_file(trained("deit_nano").state_dict(), root / "run" / "weights.safetensors")
    return root


@pytest.fixture(scope="module")
def images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def answer(folder: Path, images: list[Path]) -> dict[str, Any]:
    return collect(Question(images[:2], str(folder / "run"), methods=FAST))


def test_classes_are_those_of_the_run(answer: dict[str, Any], images: list[Path]) -> None:
    for entry, path in zip(answer["pictures"], images, strict=False):
        right = int(path.stem[-1])
        assert entry["target"]["name"] == ["lying <b>", "standing"][right] and entry["target"]["probability"] > 0.9
        assert entry["classes"][0] == entry["target"] and not entry["asked"]
        assert sum(one["probability"] for one in entry["classes"]) == pytest.approx(1)
    assert answer["model"] == "deit_nano (run)" and answer["notes"] == []


def test_maps_are_what_explain_says(answer: dict[str, Any], folder: Path, images: list[Path]) -> None:
    classifier = open_classifier(str(folder / "run"))
    image = classifier.see(read_image(images[0]))[None]
    entry = answer["pictures"][0]
    assert [one["method"] for one in entry["maps"]] == list(FAST)
    for one in entry["maps"]:
        said = explain(classifier.model, image, one["method"], entry["target"]["number"])
        values = decoded(one["values"], "u1", 32, 32).astype(float) - (128 if one["signed"] else 0)
        assert one["signed"] == said.signed and one["failed"] is None and one["about"]
        assert np.corrcoef(values.ravel(), said.maps[0].flatten().numpy())[0, 1] > 0.95
        assert 0 <= one["deletion"] <= 1 and 0 <= one["insertion"] <= 1 and -1 <= one["shuffled"] <= 1
    faithful = next(one for one in entry["maps"] if one["method"] == "occlusion")
    assert faithful["deletion"] < entry["random"]["deletion"] and faithful["insertion"] > entry["random"]["insertion"]


def test_levels() -> None:
    heat = torch.linspace(-1, 3, 300).view(15, 20)
    plain = decoded(levels(heat, signed=False)["values"], "u1", 15, 20)
    assert plain[0, 0] == 0 and plain[-1, -1] == 255 and (np.diff(plain.ravel().astype(int)) >= 0).all()
    both = decoded(levels(heat, signed=True)["values"], "u1", 15, 20).astype(int)
    assert both.ravel()[75] == 128 and both[-1, -1] == 255 and 80 < both[0, 0] < 128
    assert set(decoded(levels(torch.zeros(4, 4), True)["values"], "u1")) == {128}
    assert set(decoded(levels(torch.ones(4, 4), False)["values"], "u1")) == {0}
    large = levels(torch.rand(448, 300), signed=False)
    assert (large["rows"], large["columns"]) == (224, 150)


def test_tokens_that_are_left(folder: Path, images: list[Path]) -> None:
    question = Question(images[:1], str(folder / "run"), methods=("gradient",), applied="evit:keep=0.6,layers=(1,3)")
    entry = collect(question)["pictures"][0]
    assert [(one["left"], one["of"], one["made"]) for one in entry["tokens"]] == [
        (64, 64, 0), (39, 64, 1), (39, 64, 1), (24, 64, 1), (24, 64, 1), (24, 64, 1)]
    masks = [decoded(one["mask"], "u1", 8, 8) for one in entry["tokens"]]
    assert [mask.sum() for mask in masks] == [64, 39, 39, 24, 24, 24]
    assert (masks[3] <= masks[1]).all()
    last = laid(entry["attention"][-1])[0]
    assert ((last.sum(1)[1:] > 0) == (masks[-1].ravel() > 0)).all()  # the tokens that look are those that are left
    assert all(layer["prefix"] == 1 and layer["rows"] == 8 for layer in entry["attention"])


def test_a_network_without_attention_has_maps_and_a_line(images: list[Path]) -> None:
    entry = collect(Question(images[:1], "convnext_nano", methods=("gradcam", "t_tame")))["pictures"][0]
    assert entry["attention"] == [] and entry["tokens"] == []
    assert entry["left_out"][0].startswith("This model computes no attention weights")
    good, bad = entry["maps"]
    assert good["failed"] is None and bad["failed"].startswith("t_tame") and "values" not in bad
    with pytest.raises(SaccadeError, match="no method gives a map: t_tame"):
        collect(Question(images[:1], "convnext_nano", methods=("t_tame",)))


def test_an_asked_class_is_explained(folder: Path, images: list[Path]) -> None:
    for target in ("1", "standing"):
        entry = collect(Question(images[:1], str(folder / "run"), methods=("gradient",), target=target))["pictures"][0]
        assert entry["target"]["number"] == 1 and entry["asked"]
    assert entry["target"]["probability"] == pytest.approx(
        next(one["probability"] for one in entry["classes"] if one["number"] == 1))


def test_text_of_options() -> None:
    assert parsed_method("evit") == ("evit", {})
    assert parsed_method("evit:keep=0.6,layers=(1,3)") == ("evit", {"keep": 0.6, "layers": (1, 3)})
    assert chosen_methods(["all"]) == chosen_methods([]) == saccade.list_explainers()
    for wrong in ("evit:0.6", "evit:keep=", "evit:keep=open('x')", "evit:keep=0.6)+f("):
        with pytest.raises(SaccadeError, match="give METHOD or METHOD:OPTION=VALUE"):
            parsed_method(wrong)


@pytest.mark.parametrize(("arguments", "says"), [
    (["missing.png", "--model", "deit_nano"], "missing.png: cannot be decoded (No such file or directory)"),
    (["PICTURE", "--model", "deit_nono"], "no model 'deit_nono'; did you mean"),
    (["PICTURE", "--model", "timm:resnet1"], "timm has no model 'resnet1'; did you mean"),
    (["PICTURE", "--model", "torchvision:resnet1"], "torchvision has no classifier 'resnet1'; did you mean"),
    (["PICTURE", "--model", "hf:FOLDER"], "cannot be opened"),
    (["PICTURE", "--model", "FOLDER"], "holds no finished run"),
    (["PICTURE", "--model", "RUN", "--pretrained"], "its own weights"),
    (["PICTURE", "--model", "deit_nano", "--method", "gradcum"], "'gradcum'; did you mean gradcam"),
    (["PICTURE", "--model", "deit_nano", "--target", "1000"], "the model has the classes 0 to 999"),
    (["PICTURE", "--model", "RUN", "--target", "standin"], "no class 'standin'; did you mean standing"),
    (["PICTURE", "--model", "convnext_nano", "--apply", "evit"], "needs a plain vision transformer"),
    (["PICTURE", "--model", "hat_nano_x2"], "only a classifier"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, says, capsys, folder, images, tmp_path) -> None:
    places = {"PICTURE": images[0], "RUN": folder / "run", "FOLDER": tmp_path, "hf:FOLDER": f"hf:{tmp_path}"}
    out = tmp_path / "page.html"
    code, _, error = run(capsys, "explain", *(places.get(one, one) for one in arguments), "--out", out)
    assert code == 2 and says in error and error.startswith("saccade: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_the_work(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked: list[str] = []
    with pytest.raises(SaccadeError, match="cannot be written .*choose another --out"):
        write_page(Question(images[:1], "deit_nano"), tmp_path / "file" / "a.html", lambda *now: asked.append(now[0]))
    assert asked == []


def test_scores_that_are_not_finite(images: list[Path], tmp_path: Path) -> None:
    broken = create_model("deit_nano")
    torch.nn.init.constant_(broken.head.weight, float("nan"))
    save_file(broken.state_dict(), tmp_path / "nan.safetensors")
    with pytest.raises(SaccadeError, match="scores of deit_nano are not finite"):
        collect(Question(images[:1], "deit_nano", tmp_path / "nan.safetensors"))


@pytest.fixture(scope="module")
def page(folder: Path, images: list[Path]) -> Path:
    out = folder / "deep" / "page.html"
    write_page(Question(images[:2], str(folder / "run"), methods=(*FAST, "t_tame"), applied="evit:keep=0.6,layers=(3,)",
                        command="saccade explain '<script>'"), out)
    return out


def test_the_command_writes_a_page_that_loads_nothing(capsys, folder, images) -> None:
    out = folder / "cli.html"
    code, said, _ = run(capsys, "explain", *images[:2], "--model", folder / "run", "--method", "gradient,gradcam",
                        "--out", out)
    assert code == 0 and said.splitlines()[-1] == str(out)
    assert re.search(r"^0-\d.png: (standing|lying <b>), \d+\.\d%; 2 maps$", said.splitlines()[0])
    text = out.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import", text) and "default-src 'none'" in text
    assert "lying <b>" not in text and len(text) < 700_000
    assert f"saccade explain {images[0]}" in text


@pytest.mark.browser
@needs_chromium
def test_in_a_browser(page: Path) -> None:
    with opened(page) as found:
        seen = found.page

        def canvas(place: str) -> str:
            return seen.evaluate(f"document.querySelector({place!r}).toDataURL()")

        def names(place: str) -> list[str]:
            return [" ".join(text.split()) for text in seen.locator(f"{place} > *").all_inner_texts()]

        assert seen.locator("h1").inner_text().split(",")[0] in ("lying <b>", "standing")
        assert sorted(names("#methods")) == ["gradcam", "gradient", "integrated gradients", "occlusion"]
        assert names("#failed")[0].startswith("t_tame")
        first = canvas("#map canvas")
        seen.locator("#methods button").nth(2).click()
        assert canvas("#map canvas") != first
        assert seen.locator("#methods [aria-pressed=true]").count() == 1
        assert seen.locator("#scores tr.chosen th").inner_text() == seen.locator("#method").inner_text()
        seen.locator("#scores tbody tr").first.click()
        assert canvas("#map canvas") == first

        strength = "getComputedStyle(document.querySelector('#map canvas')).opacity"
        assert seen.evaluate(strength) == "0.9"
        seen.locator("#map-strength").fill("25")
        assert seen.evaluate(strength) == "0.25"
        assert "grayscale(0.25)" in seen.evaluate("getComputedStyle(document.querySelector('#map img')).filter")

        box = seen.locator("#places .frame")
        box.scroll_into_view_if_needed()
        edge = box.bounding_box()

        def point(x: float, y: float, act: Any = None) -> str:
            (act or seen.mouse.move)(edge["x"] + x * edge["width"], edge["y"] + y * edge["height"])
            return seen.locator("#places").get_attribute("data-token")

        seen.locator("#layers button").nth(1).click()
        assert point(0.05, 0.05) == "1"
        corner, small = canvas("#places canvas"), canvas("#layers > :first-child canvas")
        assert point(0.95, 0.05) == "8" and point(0.95, 0.95) == "64"
        assert canvas("#places canvas") != corner and canvas("#layers > :first-child canvas") != small
        assert "row 8, column 8 looks most at" in seen.locator("#reading").inner_text()
        assert point(0.05, 0.05) == "1" and canvas("#places canvas") == corner
        point(0.05, 0.05, seen.mouse.click)
        assert point(0.5, 0.5) == "1"  # held
        point(0.5, 0.5, seen.mouse.click)
        assert point(0.5, 0.5) == "37"
        box.press("ArrowLeft")
        assert seen.locator("#places").get_attribute("data-token") == "36"
        seen.get_by_role("button", name="class token").click()
        assert seen.locator("#places").get_attribute("data-token") == "0"
        assert "The class token looks most at" in seen.locator("#reading").inner_text()
        mean = canvas("#places canvas")
        seen.locator("#heads button").nth(2).click()
        assert canvas("#places canvas") != mean and names("#heads") == ["mean", "head 1", "head 2"]
        seen.locator("#layers button").nth(5).click()
        assert names("#tokens")[3] == "blocks.3 39 of 64 + 1"

        seen.get_by_role("tab").nth(1).click()
        assert "1-" in seen.locator("h1 span").inner_text() and canvas("#map canvas") != first
        seen.set_viewport_size({"width": 420, "height": 900})
        assert seen.evaluate("document.documentElement.scrollWidth") == 420
        assert found.is_calm_and_offline()


@pytest.fixture(scope="module")
def heads_page(folder: Path, images: list[Path]) -> tuple[Path, dict[str, Any]]:
    out = folder / "heads.html"
    return out, write_page(Question(images[:2], str(folder / "run"), methods=("gradient",), heads=True), out)


def test_heads_on_the_page(heads_page: tuple[Path, dict[str, Any]]) -> None:
    said = heads_page[1]["heads"]
    assert said["layers"] == [f"blocks.{number}.mixer" for number in range(6)]
    assert [one["name"] for one in said["metrics"]] == ["drop", "moved", "turned", "alone"]
    assert all(len(row) == 2 for one in said["metrics"] for row in one["values"])
    for one in said["reach"]:
        whole = [sum(rings) + rest for rings, rest in zip(one["rings"], one["prefix"], strict=True)]
        assert whole == pytest.approx([1, 1])
        assert len(one["rings"][0]) == 8 and all(0 <= far <= 7 for far in one["distance"])
    points = said["patterns"]["points"]
    assert len(points) == 24 and {one["picture"] for one in points} == {0, 1}
    assert decoded(points[0]["map"], "u1", 32, 32).max() == 255


def test_heads_need_attention(images: list[Path]) -> None:
    with pytest.raises(SaccadeError, match="heads need a network with softmax attention"):
        collect(Question(images[:1], "convnext_nano", methods=("gradient",), heads=True))


@pytest.mark.browser
@needs_chromium
def test_heads_in_a_browser(heads_page: tuple[Path, dict[str, Any]]) -> None:
    values = heads_page[1]["heads"]["metrics"][0]["values"]
    with opened(heads_page[0]) as found:
        seen = found.page
        cells = seen.locator("#importance button")
        assert cells.count() == 12 and seen.locator("#importance [aria-pressed=true]").count() == 1
        best = max(range(12), key=lambda cell: values[cell // 2][cell % 2])
        reading = seen.locator("#head-reading").inner_text()
        assert f"blocks.{best // 2}, head {best % 2 + 1}: probability lost" in reading
        cells.nth(7).click()
        assert "blocks.3, head 2" in seen.locator("#head-reading").inner_text()
        assert seen.locator("#heads-title").inner_text() == "Heads of blocks.3.mixer"  # the attention above follows
        assert seen.locator("#rings .line").count() == 2 and seen.locator("#plane .point.chosen").count() == 2
        before = seen.evaluate("document.querySelector('#pattern').toDataURL()")
        seen.locator("#plane .point").nth(0).dispatch_event("pointerenter")
        assert seen.evaluate("document.querySelector('#pattern').toDataURL()") != before
        assert seen.locator("#pattern-name").inner_text().startswith("blocks.0, head 1")
        seen.locator("#metrics button").nth(3).click()
        assert "only one of its layer" in seen.locator("#metric-about").inner_text()
        seen.set_viewport_size({"width": 420, "height": 900})
        assert seen.evaluate("document.documentElement.scrollWidth") == 420
        assert found.is_calm_and_offline()


@pytest.mark.browser
@needs_chromium
def test_a_picture_without_maps_beside_one_that_has_some(answer: dict[str, Any], tmp_path: Path) -> None:
    with_maps, without = answer["pictures"]
    bare = without | {"maps": [{**one, "failed": f"{one['method']}: no"} for one in without["maps"]], "attention": [],
                      "left_out": ["no attention"]}
    mixed = answer | {"pictures": [with_maps, bare]}
    (tmp_path / "page.html").write_text(render("explain.html.jinja", answer=mixed, data=Markup(json.dumps(mixed))))
    with opened(tmp_path / "page.html") as found:
        parts = [found.page.locator(place) for place in ("#map", "#trust-section", "#attention")]
        assert all(part.is_visible() for part in parts)
        found.page.get_by_role("tab").nth(1).click()
        assert not any(part.is_visible() for part in parts)
        assert found.page.locator("#failed li").count() == len(FAST)
        found.page.get_by_role("tab").nth(0).click()
        assert all(part.is_visible() for part in parts) and found.is_calm_and_offline()


@pytest.mark.browser
@needs_chromium
def test_light_and_dark_differ_and_can_be_read(page: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with opened(page, scheme=scheme) as found:
            ground, ink = (found.page.evaluate(f"getComputedStyle(document.body).{key}") for key in
                           ("backgroundColor", "color"))
            bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ground, ink)]
            assert abs(bright[0] - bright[1]) > 0.6
            grounds.append(bright[0])
    assert grounds[0] > 0.9 and grounds[1] < 0.2
