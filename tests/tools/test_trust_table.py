"""`saccade trust`: a known model gets the scores that follow, boxes go through the preprocessing, one line an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from saccade import SaccadeError
from saccade.papers.explainable_robust import NINE
from saccade.tools import trust_table
from saccade.tools.classifiers import Classifier
from saccade.tools.trust_table import Trial, judge, spread, table
from tests.test_cli import run


class Patterns(nn.Module):
    """Scores of checks, lying and standing stripes: the strongest answer anywhere to the planted 8 x 8 square."""

    def __init__(self) -> None:
        super().__init__()
        bars = torch.arange(8) // 2 % 2 * 2.0 - 1
        kinds = torch.stack([-bars[:, None] * bars, bars[:, None].expand(8, 8), bars.expand(8, 8)])
        self.kernels = nn.Parameter(kinds[:, None].expand(-1, 3, -1, -1) / 192)

    def forward(self, image: Tensor) -> Tensor:
        return 8 * nn.functional.conv2d(image - image.mean((2, 3), keepdim=True), self.kernels).amax((2, 3))


def planted(name: str = "", *args: object, **options: object) -> Classifier:
    def see(picture: Image.Image) -> Tensor:
        return (v2.functional.pil_to_tensor(picture) / 255 - 0.5) / 0.25

    return Classifier(Patterns().eval(), "patterns", see, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_table, "open_classifier", planted)


def test_a_model_of_the_planted_square_is_explained_at_it(patterns: None) -> None:
    quick = ("gradient", "gradient_x_input", "integrated_gradients", "occlusion", "gradcam")
    seen: list[tuple[int, int]] = []
    found = judge(Trial("planted", ("a", "b"), quick, ("contrast",), pictures=8),
                  lambda text, done, total: seen.append((done, total)))
    assert found["conditions"] == ["clean", "contrast"] and found["pictures"] == 8
    assert seen == [(number, 2 * 2 * 6) for number in range(24)]
    first, second = found["models"]
    assert first["scores"] == second["scores"] and first["accuracy"]["clean"] > 0.9
    assert first["confidence"]["contrast"] < first["confidence"]["clean"]
    rows = {row["method"]: row for row in first["scores"] if row["condition"] == "clean"}
    assert rows["random"]["pointing"] == pytest.approx(64 / 1024)  # the share of the square
    for method in quick[:4]:
        assert rows[method]["pointing"] > 0.8, method
        assert rows[method]["deletion"] < rows["random"]["deletion"] - 0.05, method
        assert rows[method]["insertion"] > rows["random"]["insertion"] + 0.05, method
    assert rows["gradcam"]["pointing"] is None and "no map" in rows["gradcam"]["failed"]
    text = table(found).splitlines()
    assert text[0].count("|") == text[2].count("|") == text[3].count("|") == 9
    assert text[2].startswith("| **a** | accuracy ") and text[-1].startswith("b, gradcam: ")


def test_a_box_goes_through_the_preprocessing(patterns: None, tmp_path: Path) -> None:
    """Scaled to 16 rows and cropped to the middle: a box at the edge is gone, one in the middle half as large."""
    see = v2.Compose([v2.Resize(16), v2.CenterCrop(16), v2.PILToTensor()])
    classifier = Classifier(Patterns(), "", lambda one: see(one) / 255.0, (0.0,) * 3, (1.0,) * 3)
    split = trust_table.Split([torch.zeros(32, 64, 3, dtype=torch.uint8).numpy()] * 3, [0, 0, 0], ["a", "b", "c"])
    where = trust_table._objects(classifier, split, [0, 1, 2], {"a": (24, 8, 40, 24), "b": (0, 0, 8, 8)})
    assert where is not None and where.sum((1, 2)).tolist() == [64, 0, 0]
    assert where[0, 4:12, 4:12].all()


def test_boxes_from_a_file(patterns: None, tmp_path: Path) -> None:
    whole = judge(Trial("planted", ("a",), ("gradient",), (), pictures=4))
    images = trust_table.open_images("planted").test
    lines = [f"{name},{left},{top},{right},{bottom}" for name in images.paths
             for left, top, right, bottom in [trust_table.planted_box(name)]]
    file = tmp_path / "boxes.csv"
    file.write_text("\n".join(["path,left,top,right,bottom", *lines]))
    again = judge(Trial("planted", ("a",), ("gradient",), (), pictures=4, boxes=file))
    assert again["models"] == whole["models"] and table(whole).splitlines()[0].count("|") == 6


def test_pictures_lie_evenly() -> None:
    split = trust_table.Split([], list(range(10)), [])
    assert spread(split, 4) == [0, 3, 6, 9] and spread(split, 99) == list(range(10))


@pytest.mark.parametrize(("trial", "message"), [
    (Trial("planted", ()), "no model"),
    (Trial("planted", ("a",), pictures=0), "pictures is 0"),
    (Trial("planted", ("a",), ("gradcat",)), "no attribution method 'gradcat'; did you mean gradcam"),
    (Trial("planted", ("a",), corruptions=("nose",)), "no corruption 'nose'"),
    (Trial("planted", ("a",), strength=0), "strength is 0"),
    (Trial("digits", ("a",)), "patterns has 3 classes, the set 10 .*trained on it"),
    (Trial("planted", ("a",), boxes=Path("nowhere.csv")), "nowhere.csv cannot be read as boxes .*left, top"),
])
def test_errors_say_what_to_do(patterns: None, trial: Trial, message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        judge(trial)


def test_boxes_of_other_pictures_are_refused(patterns: None, tmp_path: Path) -> None:
    file = tmp_path / "boxes.csv"
    file.write_text("path,left,top,right,bottom\nother.png,0,0,1,1\n")
    with pytest.raises(SaccadeError, match="no picture of the test part: paths are as in "):
        judge(Trial("planted", ("a",), boxes=file))


def test_the_command(patterns: None, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("trust", "planted", "--models", "a", "--methods", "gradient", "--corruptions", "", "--pictures", "2")
    code, out, _ = run(capsys, *asked)
    assert code == 0 and out.startswith("| model | method | pointing % | deletion | insertion |\n")
    code, out, _ = run(capsys, *asked, "--json")
    assert code == 0 and json.loads(out)["methods"] == ["random", "gradient"]
    code, _, err = run(capsys, "trust", "planted", "--models", "a", "--corruptions", "nose")
    assert code == 2 and err.startswith("saccade: there is no corruption 'nose'")
    assert Trial("planted", ("a",)).methods == NINE
