"""`saccade compare` as a whole, on a few small pictures with the smallest of networks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from saccade.core.errors import SaccadeError
from saccade.core.origin import Origin, of_model
from saccade.learn import runs, train
from saccade.learn.data import open_images
from saccade.learn.loop import Outcome
from saccade.tools import compare as room
from saccade.tools import graphs, ship, standings, trials
from saccade.tools.compare import Contest, compare, seconds
from saccade.tools.contestants import MAJORITY, NEIGHBORS, Contestant, contestants, references, start_of
from saccade.tools.ship import Shipped

MODELS = """
import torch
from torch import nn

def small(num_classes, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(),
                         nn.Linear(width * 9, num_classes))

def mean(num_classes, in_chans, img_size):
    head = nn.Linear(in_chans, num_classes) if num_classes else nn.Identity()
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

def late(num_classes):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, num_classes)
        def forward(self, x):
            if self.training:
                raise RuntimeError("no such kernel\\nand a second line")
            return self.head(x.mean((2, 3)))
    return Fails()

def no_scores(num_classes):
    return nn.Flatten()

def no_classes():
    return nn.Flatten()
"""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One round of each race, whose counting is tested where it is, and graphs, which take long, only where asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standings, "ROUNDS", (1, 1))
        _export_is_installed(patch, False)
        yield


def _export_is_installed(patch: pytest.MonkeyPatch, installed: bool) -> None:
    for module in (room, graphs, ship):
        patch.setattr(module, "has_onnx", lambda: installed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` of three colours, half of them hard to see, and `nets.py`."""
    folder, random = tmp_path_factory.mktemp("compare"), np.random.default_rng(0)
    (folder / "nets.py").write_text(MODELS)
    for label, name in enumerate(("blue", "green", "red")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 256, (8, 8, 3))
            pixels[..., 2 - label] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "photos" / name / f"{number}.png")
    return folder


def contest(place: Path, out: Path, *names: str, **settings: Any) -> Contest:
    models = tuple(f"{place}/nets.py:{name}" for name in names)
    defaults = {"data": str(place / "photos"), "img_size": 8, "epochs": 2, "seeds": 2, "batch_size": 8}
    return Contest(models=models, out=out, **defaults | settings)


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Contest, dict[str, Any]]:
    asked = contest(place, tmp_path_factory.mktemp("out") / "new", "small", "mean", "late", "no_scores")
    return asked, compare(asked)


def named(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in results["contestants"] if one["name"].endswith(name))


def test_everyone_takes_part_and_who_fails_is_listed_with_the_reason(finished: tuple[Contest, dict[str, Any]]) -> None:
    _, results = finished
    kinds = [(one["name"].rpartition(":")[2], one["kind"], one["failed"]) for one in results["contestants"]]
    assert kinds == [
        ("small", "model", None), ("mean", "model", None), ("late", "model", "RuntimeError: no such kernel"),
        ("no_scores", "model", "it returns (2, 192) for two pictures and 3 classes: scores (2, 3) are needed"),
        (MAJORITY, "reference", None), (NEIGHBORS, "reference", None), ("narrow ResNet", "reference", None)]
    assert results["settings"]["epochs"] == 2 and results["settings"]["seeds"] == [0, 1]
    assert results["data"]["counts"] == {"train": 36, "val": 12, "test": 12}


def test_numbers_are_complete_and_agree_with_each_other(finished: tuple[Contest, dict[str, Any]]) -> None:
    _, results = finished
    for one in results["contestants"]:
        if one["failed"]:
            assert one["metrics"] is None
            continue
        accuracies = [seed["accuracy"] for seed in one["seeds"]]
        assert one["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(accuracies))
        assert np.trace(one["confusion"]) / np.sum(one["confusion"]) == pytest.approx(np.mean(accuracies))
        assert np.sum(one["confusion"]) == 12 * len(accuracies)
        assert set(one["recall"]) == {"blue", "green", "red"}
    small = named(results, ":small")
    assert small["params"] == (27 * 8 + 8) + (72 * 3 + 3)
    assert small["macs"] == 27 * 8 * 9 + 72 * 3
    assert [curve["epoch"] for curve in small["curves"]] == [[1, 2], [1, 2]]
    assert small["latency_ms"]["p50"] <= small["latency_ms"]["p95"] and small["throughput"] > 0
    assert small["peak_memory"] >= 8 * 72 * 4 and small["training_seconds"] > 0
    assert named(results, MAJORITY)["metrics"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert results["recommendation"]["sentence"].endswith(".")


def test_the_weights_that_are_named_gave_the_answers(finished: tuple[Contest, dict[str, Any]], place: Path) -> None:
    asked, results = finished
    found = named(results, ":small")
    model = contestants(asked.models[:1], (), 8)[0].build(3, False)  # type: ignore[misc]
    model.load_state_dict(load_file(asked.out / found["weights"]))  # type: ignore[operator]
    images = open_images(asked.data)
    answers = train.predict_logits(model, images.test, img_size=8).argmax(1)
    seed = next(one for one in found["seeds"] if f"seed-{one['seed']}" in found["weights"])
    assert (answers == torch.tensor(images.test.labels)).float().mean() == pytest.approx(seed["accuracy"])


def test_files_say_the_same_as_the_results(finished: tuple[Contest, dict[str, Any]]) -> None:
    asked, results = finished
    assert asked.out is not None
    assert json.loads((asked.out / "results.json").read_text()) == results
    rows = list(csv.DictReader((asked.out / "results.csv").open()))
    assert [row["name"] for row in rows] == [one["name"] for one in results["contestants"]]
    assert float(rows[0]["accuracy_low"]) == results["contestants"][0]["metrics"]["accuracy"]["low"]
    assert "no such kernel" in (asked.out / "report.html").read_text()
    maps = results["looks"]["maps"]
    assert len(results["looks"]["images"]) == 3 and all(len(seen) == 3 for seen in maps.values())
    assert any(name.endswith(":small") for name in maps) and MAJORITY not in maps
    assert not list(asked.out.rglob("*.part"))


def test_the_recommended_network_is_shipped_with_the_weights_that_are_named(
        place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "references", lambda *_: [])
    _export_is_installed(monkeypatch, True)
    asked, best = contest(place, tmp_path / "out", "mean"), tmp_path / "out" / "best"
    results = compare(asked)
    (found,) = results["contestants"]
    weights, shipped = load_file(tmp_path / "out" / found["weights"]), load_file(best / "model.safetensors")
    assert weights.keys() == shipped.keys() and all(torch.equal(weights[name], shipped[name]) for name in weights)
    assert results["best"]["parity"]["pictures"] == 12 and results["best"]["parity"]["scores"] < 1e-5
    card, page = (best / "MODEL_CARD.md").read_text(), (tmp_path / "out" / "report.html").read_text()
    seed = next(one for one in found["seeds"] if f"seed-{one['seed']}" in found["weights"])
    assert f"those of seed {seed['seed']}, the best on validation: accuracy {100 * seed['accuracy']:.1f} %" in card
    assert "as mean of nets.py makes it" in card and 'href="best/MODEL_CARD.md"' in page
    built = _run_card(best)
    assert all(torch.equal(value, shipped[name]) for name, value in built.state_dict().items())


def test_the_licence_of_what_the_winner_began_with_is_minded(
        place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a line of the terminal, in the report and on the card."""
    (mean,) = contestants((f"{place}/nets.py:mean",), (), 8)
    theirs = replace(mean, origin=Origin("theirs.pth", licence="CC-BY-NC-4.0"))
    monkeypatch.setattr(room, "contestants", lambda *_: [theirs])
    monkeypatch.setattr(room, "references", lambda *_: [])
    results = compare(contest(place, tmp_path / "out", "mean", epochs=1, seeds=1, start="finetune"))
    said = "the starting weights (theirs.pth) are under CC-BY-NC-4.0, which forbids commercial use"
    assert results["best"]["warning"].startswith(said)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"warning: {said}")
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert said in (tmp_path / "out" / "best" / "MODEL_CARD.md").read_text()


def test_contestants_know_whose_weights_they_begin_with(place: Path) -> None:
    ours, timms, file = contestants(("swin_tiny", "timm:resnet18", f"{place}/nets.py:mean"), (), 32)
    assert ours.begins("finetune") == ours.begins("probe") == of_model("swin_tiny")
    assert ours.begins("scratch") == timms.begins("scratch") == Origin()
    assert timms.begins("finetune").licence == "apache-2.0" and not timms.begins("finetune").warning
    assert file.begins("scratch").source == "as mean of nets.py makes it" and not file.begins("scratch").warning
    reduced = contestants(("deit_tiny",), (), 32, ("evit:keep=0.7",))
    assert reduced[1].begins("finetune") == reduced[0].begins("finetune") == of_model("deit_tiny")


def _run_card(best: Path) -> torch.nn.Module:
    """The model that the Python of the card makes."""
    names: dict[str, Any] = {}
    code = (best / "MODEL_CARD.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace("model.safetensors", str(best / "model.safetensors")), names)
    model: torch.nn.Module = names["model"]
    return model


def test_the_extra_export_installed_later_adds_graphs_and_trains_nothing(
        place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "references", lambda *_: [])
    asked = contest(place, tmp_path / "out", "mean", epochs=1, seeds=1)
    before = compare(asked)
    assert before["best"]["missing"] == ship.HINT and not (tmp_path / "out" / "best" / "predict.py").exists()
    assert before["settings"]["latency"].startswith("PyTorch ") and compare(asked) == before
    assert before["contestants"][0]["latencies_ms"].keys() == {"PyTorch"}
    _export_is_installed(monkeypatch, True)
    fits = _count_fits(monkeypatch)
    results = compare(asked)
    (found,) = results["contestants"]
    assert not fits and (tmp_path / "out" / "best" / "predict.py").exists() and results["best"]["parity"]
    assert results["settings"]["latency"].startswith("onnxruntime ")
    assert found["latencies_ms"].keys() == {"PyTorch", "onnxruntime", "onnxruntime int8"}
    assert found["latency_ms"] == found["latencies_ms"]["onnxruntime"]
    assert found["metrics"] == before["contestants"][0]["metrics"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f">{title}<" in page for title in ("Latency p50", "PyTorch p50", "int8 p50", "int8 accuracy"))


def test_all_are_ranked_by_what_runs_all(
        place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One network that cannot be exported: nobody is ranked by onnxruntime, whose numbers stand beside."""
    real = graphs.export_square

    def export(model: torch.nn.Module, *rest: Any) -> Any:
        if len(model) == 3:  # type: ignore[arg-type]  # `mean`
            raise RuntimeError("no such operator")
        return real(model, *rest)

    monkeypatch.setattr(graphs, "export_square", export)
    _export_is_installed(monkeypatch, True)
    monkeypatch.setattr(room, "references", lambda *_: [])
    results = compare(contest(place, tmp_path / "out", "small", "mean", epochs=1, seeds=1))
    small, mean = results["contestants"]
    assert mean["graph_failed"] == "RuntimeError: no such operator" and small["graph_failed"] is None
    assert results["settings"]["latency"].endswith("nets.py:mean (RuntimeError: no such operator)")
    assert [one["latency_ms"] for one in (small, mean)] == [one["latencies_ms"]["PyTorch"] for one in (small, mean)]
    assert "onnxruntime" in small["latencies_ms"] and mean["int8_accuracy"] is None
    right = graphs.predictions(_arena(place, tmp_path / "out"),
                               tmp_path / "out" / small["weights"].rpartition("/seed")[0] / "model.int8.onnx")
    labels = open_images(str(place / "photos")).test.labels
    assert small["int8_accuracy"]["value"] == pytest.approx(np.mean(right == np.array(labels)))


def test_what_is_no_network_is_not_shipped(finished: tuple[Contest, dict[str, Any]]) -> None:
    asked, results = finished
    assert asked.out is not None and results["recommendation"]["choice"] == NEIGHBORS
    assert results["best"]["missing"] == "nothing is shipped: pixel k-NN, which is recommended, is no network"
    assert not results["best"]["shipped"] and not (asked.out / "best").exists()
    assert "Nothing is shipped: pixel k-NN" in (asked.out / "report.html").read_text()


def test_a_line_for_each_seed_without_a_terminal_and_the_same_command_again_runs_nothing(
        place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = contest(place, tmp_path / "out", "mean", epochs=1, seeds=1)
    first = compare(asked)
    lines = capsys.readouterr().out.splitlines()
    assert ":mean, seed 0: " in lines[0] and lines[1].startswith("narrow ResNet, seed 0: ")
    assert lines[2:4] == [first["recommendation"]["sentence"], f"{asked.out}/report.html shows how this was found"]
    assert lines[4:] == Shipped.read(first["best"]).lines(tmp_path / "out" / "best") and len(lines) == 5
    monkeypatch.setattr(room, "_run", lambda *_: pytest.fail("it ran again"))
    assert compare(asked) == first


@pytest.mark.parametrize("moment", [2, 13, 41])
def test_a_stopped_contest_goes_on_and_ends_as_if_it_had_not_been(
        place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Contest, dict[str, Any]],
        moment: int) -> None:
    """Stopped after `moment` steps of training: in the search for a rate, in a seed, in another contestant."""
    asked = contest(place, tmp_path / "out", "small", "mean", "late", "no_scores")
    _stop_after(moment, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compare(asked)
    monkeypatch.undo()
    assert asked.out is not None and not (asked.out / "results.json").exists()
    fits = _count_fits(monkeypatch)
    results = compare(asked)
    for one, whole in zip(results["contestants"], finished[1]["contestants"], strict=True):
        for key in ("seeds", "metrics", "recall", "confusion", "learning_rate", "curves", "weights"):
            assert one[key] == whole[key], (one["name"], key)
        if whole["weights"]:
            assert (asked.out / one["weights"]).read_bytes() == (finished[0].out / whole["weights"]).read_bytes()  # type: ignore[operator]
    finished_before = {2: 0, 13: 3, 41: 10}[moment]
    assert len(fits) <= 18 - finished_before


def _stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = trials.fit, [0]

    def fit(*arguments: Any, progress: Callable[[Any], None], **options: Any) -> Any:
        def counted(step: Any) -> None:
            seen[0] += 1
            if seen[0] > steps:
                raise KeyboardInterrupt
            progress(step)
        return real(*arguments, progress=counted, **options)

    monkeypatch.setattr(trials, "fit", fit)


def _count_fits(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    real, folders = trials.fit, list[Path]()

    def fit(make: Any, images: Any, recipe: Any, folder: Path, **options: Any) -> Any:
        folders.append(folder)
        return real(make, images, recipe, folder, **options)

    monkeypatch.setattr(trials, "fit", fit)
    return folders


@pytest.mark.parametrize(("models", "mixers", "message"), [
    ((), (), "no model is named"),
    (("swin_nanno",), (), "no model 'swin_nanno'; did you mean"),
    (("timm:resnet19",), (), "timm has no model 'resnet19'; did you mean"),
    (("swin_nano",), ("windoww",), "no mixer 'windoww'"),
    (("timm:resnet18",), ("pooling",), "mixers go into our own models"),
    (("swin_nano", "swin_nano"), (), "named twice"),
    (("nowhere.py:small",), (), "no file nowhere.py"),
])
def test_names_that_mean_nothing_are_errors_before_anything_runs(
        models: tuple[str, ...], mixers: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match=message):
        compare(Contest(models=models, mixers=mixers, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_file_of_ones_own_is_said(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_like_this")
    for name, message in ((f"{place}/nets.py:smal", "no function 'smal'; did you mean small"),
                          (f"{place}/nets.py:no_classes", "takes no num_classes"),
                          (f"{tmp_path}/bad.py:net", "ModuleNotFoundError: No module named 'nothing_like_this'")):
        with pytest.raises(SaccadeError, match=message):
            contestants((name,), (), 8)


@pytest.mark.parametrize(("text", "wanted"), [("90s", 90), ("10m", 600), ("1h", 3600), ("1.5 h", 5400)])
def test_budgets_are_times(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize(("settings", "message"), [
    ({"budget": "10"}, "as in 90s, 10m or 1h"), ({"budget": "0m"}, "as in 90s"), ({"epochs": 0}, "epochs is 0"),
    ({"epochs": 1, "budget": "1m"}, "give one"), ({"start": "zero"}, "scratch, finetune, probe"),
    ({"seeds": 0}, "seeds is 0"),
])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        Contest(models=("swin_nano",), **settings)


def test_the_command_asks_for_the_same_again() -> None:
    asked = Contest("digits", ("swin_nano", "deit_nano"), seeds=2, budget="10m", mixers=("pooling",), strict=True)
    assert asked.command == ("saccade compare digits --models swin_nano,deit_nano --budget 10m --seeds 2 "
                             "--mixers pooling --strict")


def test_a_folder_of_another_contest_is_left_alone(finished: tuple[Contest, dict[str, Any]], place: Path) -> None:
    other = contest(place, finished[0].out, "small", "mean", "late", "no_scores", epochs=3)  # type: ignore[arg-type]
    with pytest.raises(SaccadeError, match="another contest .epochs is 2 there and 3 here.: give another --out"):
        compare(other)


def test_a_folder_with_other_files_or_none_that_can_be_is_refused_at_the_start(
        place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "open_images", lambda *_, **__: pytest.fail("it read the images first"))
    with pytest.raises(SaccadeError, match="files in it that are no contest's"):
        compare(contest(place, place, "small"))
    with pytest.raises(SaccadeError, match="cannot be written .*give another --out"):
        compare(contest(place, place / "nets.py" / "out", "small"))


def test_two_runs_do_not_share_a_folder(place: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(SaccadeError, match="in use by another run"):
        compare(contest(place, tmp_path, "small"))


def test_a_budget_becomes_epochs_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 % and 15 s of 900 s are kept for the last stage; three trials and two seeds of two networks share 795 s."""
    monkeypatch.setattr(room.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(room, "seconds_per_epoch", lambda arena, entrant: 8.0 if entrant.kind == "model" else 2.0)
    asked = contest(place, tmp_path / "out", "mean", epochs=None, budget="900s")
    planned: list[int] = []

    def stop(arena: trials.Arena, *_: Any) -> None:
        planned.append(arena.epochs)
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "choose_rate", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(asked)
        monkeypatch.setattr(room, "seconds_per_epoch", lambda *_: pytest.fail("calibrated twice"))
    assert planned == [26, 26]  # 10 * (3 * 9 + 2 * 26) = 790 s, and 27 epochs would be 810 s


def test_the_speed_of_training_is_measured_on_a_training_that_leaves_nothing(place: Path, tmp_path: Path) -> None:
    arena = _arena(place, tmp_path)
    assert trials.seconds_per_epoch(arena, contestants((f"{place}/nets.py:small",), (), 8)[0]) > 0
    assert not list(tmp_path.iterdir())


def _arena(place: Path, out: Path, **settings: Any) -> trials.Arena:
    defaults = {"start": "scratch", "img_size": 8, "batch_size": 8, "seeds": 2, "epochs": 5}
    return trials.Arena(open_images(str(place / "photos")), out, **defaults | settings)


def test_the_learning_rate_is_the_best_on_validation_and_is_kept(
        place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int, int]] = []

    def fit(make: Any, images: Any, recipe: train.Recipe, folder: Path, **_: Any) -> Outcome:
        asked.append((recipe.learning_rate, recipe.epochs, recipe.seed))
        if recipe.learning_rate == 3e-3:
            raise SaccadeError("loss became nan")
        loss = {3e-4: 0.5, 1e-3: 0.4}[recipe.learning_rate]
        return Outcome(torch.nn.Identity(), {"val_accuracy": [0.9, 0.6], "val_loss": [0.1, loss]}, 1.0)

    monkeypatch.setattr(trials, "fit", fit)
    arena, entrant = _arena(place, tmp_path), Contestant("one", "model")
    assert trials.choose_rate(arena, entrant, lambda *_: None) == 1e-3  # equal accuracy, lower loss
    assert asked == [(3e-4, 2, 0), (1e-3, 2, 0), (3e-3, 2, 0)]
    assert trials.choose_rate(arena, entrant, lambda *_: None) == 1e-3 and len(asked) == 3


def test_no_finite_loss_at_any_rate_is_a_failure(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> None:
        raise SaccadeError("loss became nan")

    monkeypatch.setattr(trials, "fit", fit)
    with pytest.raises(SaccadeError, match="loss became nan"):
        trials.choose_rate(_arena(place, tmp_path), Contestant("one", "model"), lambda *_: None)


def test_a_probe_trains_nothing_and_says_so(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "references", lambda *_: [])  # ResNet-18 would be downloaded
    _export_is_installed(monkeypatch, True)
    monkeypatch.setattr(trials, "fit", lambda *_, **__: pytest.fail("it trained"))
    results = compare(contest(place, tmp_path / "out", "mean", epochs=None, start="probe"))
    found = named(results, ":mean")
    assert results["settings"]["start"] == "probe" and results["settings"]["epochs"] is None
    assert found["failed"] is None and found["metrics"]["accuracy"]["value"] > 0.8  # the mean colour tells the class
    assert found["knn_accuracy"]["value"] > 0.8 and len(found["seeds"]) == 1 and found["weights"] is None
    images, model = open_images(str(place / "photos")), _run_card(tmp_path / "out" / "best")
    right = train.predict_logits(model, images.test, img_size=8).argmax(1) == torch.tensor(images.test.labels)
    assert float(right.float().mean()) == pytest.approx(found["metrics"]["accuracy"]["value"])
    assert results["best"]["parity"]["scores"] < 1e-5
    with pytest.raises(SaccadeError, match="trains no epochs"):
        compare(contest(place, tmp_path / "other", "mean", start="probe"))


def test_the_default_start_is_a_probe_only_where_all_have_weights() -> None:
    with_weights, without = Contestant("a", "model", weights=True), Contestant("b", "model")
    assert start_of([with_weights]) == "probe"
    assert start_of([with_weights, without]) == "scratch"


def test_the_reference_resnet_suits_the_pictures() -> None:
    small, large, start = references(32, "scratch")[2], references(224, "scratch")[2], references(32, "finetune")[2]
    assert [each.name for each in (small, large, start)] == ["narrow ResNet", "ResNet-18", "ResNet-18"]
    assert small.build is not None
    model = small.build(4, False).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)  # type: ignore[operator]


def test_mixers_make_contestants_of_their_own() -> None:
    found = contestants(("swin_nano", "timm:resnet18"), ("pooling",), 32)
    assert [each.name for each in found] == ["swin_nano", "swin_nano+pooling", "timm:resnet18"]


def test_methods_are_rows_of_their_own_with_the_hosts_weights(place: Path, tmp_path: Path) -> None:
    """Accuracy of the host's trained weights with the method, cheaper than the host; who cannot is listed."""
    asked = Contest(str(place / "photos"), ("deit_nano", "poolformer_nano"), img_size=16, epochs=1, seeds=2,
                    out=tmp_path / "out", batch_size=8, apply=("patch_dropout:keep=0.25", "evit:keep=1.0,layers=(3,)"))
    results = compare(asked)
    host, dropped, whole = (named(results, name) for name in ("deit_nano", "=0.25", "(3,)"))
    assert [one["failed"] for one in (host, dropped, whole)] == [None] * 3
    assert (dropped["host"], dropped["method"]) == ("deit_nano", "patch_dropout:keep=0.25") and host["method"] is None
    assert dropped["macs"] < 0.5 * host["macs"] and whole["macs"] == host["macs"]
    assert whole["seeds"] == host["seeds"] and whole["metrics"] == host["metrics"]
    assert dropped["latency_ms"]["p50"] > 0 and dropped["training_seconds"] is None and not dropped["curves"]
    model = contestants(("deit_nano",), (), 16, asked.apply)[1].build(3, False).eval()  # type: ignore[misc]
    model.load_state_dict(load_file(tmp_path / "out" / dropped["weights"]))
    images = open_images(asked.data)
    right = train.predict_logits(model, images.test, img_size=16).argmax(1) == torch.tensor(images.test.labels)
    seed = next(one for one in dropped["seeds"] if f"seed-{one['seed']}" in dropped["weights"])
    assert right.float().mean() == pytest.approx(seed["accuracy"])
    failed = [one for one in results["contestants"] if one["failed"]]
    assert [one["host"] for one in failed] == ["poolformer_nano"] * 2
    assert all("plain vision transformer" in one["failed"] for one in failed)
    assert "Computing less" in (tmp_path / "out" / "report.html").read_text()
    assert "--apply 'patch_dropout:keep=0.25,evit:keep=1.0,layers=(3,)'" in results["command"]
    again = compare(asked)  # what failed is tried again, the rest is kept
    assert [one["seeds"] for one in again["contestants"]] == [one["seeds"] for one in results["contestants"]]


def test_methods_that_cannot_be_applied_are_errors_at_the_start() -> None:
    for methods, words in ((("evitt",), "did you mean evit"), (("evit:keep",), "no option"),
                           (("evit", "evit"), "named twice")):
        with pytest.raises(SaccadeError, match=words):
            contestants(("deit_nano",), (), 32, methods)
    learned = contestants(("deit_nano",), (), 32, ("ia_red2:layers=(0,2),heads=2",))[1]
    with pytest.raises(SaccadeError, match="adds weights"):
        learned.build(3, False)  # type: ignore[misc]


def test_a_seed_of_one_of_ours_is_a_run_that_the_other_commands_take(place: Path, tmp_path: Path) -> None:
    arena = _arena(place, tmp_path, epochs=1)
    entrant = contestants(("poolformer_nano",), ("attention",), 8)[1]
    found = trials.trained_answers(arena, entrant, 0, 1e-3, lambda *_: None)
    accuracy = np.mean(np.array(found.predicted) == arena.images.test.labels)
    scores = runs.evaluate(arena.folder(entrant) / "seed-0", str(place / "photos"))
    assert scores["accuracy"] == pytest.approx(accuracy)


def test_folders_have_plain_names_that_do_not_meet() -> None:
    names = [Contestant(name, "model").folder for name in ("swin_nano+window", "a/b.py:f", "a b.py:f")]
    assert names[0] == "swin_nano+window" and len(set(names)) == 3
    assert all(not set(name) & set('/\\: "') for name in names)
