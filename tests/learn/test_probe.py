"""Simple classifiers on frozen features: right numbers on features that are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from saccade.core.errors import SaccadeError
from saccade.learn.probe import extract, probe, reference_predictions
from saccade.learn.train import predict_logits


class Plain(torch.utils.data.Dataset):
    """One colour a picture: class 0 dark, 1 middle, 2 bright."""

    def __init__(self, count: int, seed: int) -> None:
        self.labels = [min(2, i % 4) for i in range(count)]  # half of all are bright
        random = np.random.default_rng(seed)
        self.pictures = [
            Image.new("RGB", (6, 6), tuple(int(v) for v in 40 + 80 * label + random.integers(-15, 15, 3)))
            for label in self.labels
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.pictures[i], self.labels[i]


@pytest.fixture(scope="module")
def images() -> SimpleNamespace:
    return SimpleNamespace(train=Plain(40, 0), val=Plain(20, 1), test=Plain(16, 2))


def test_reference_predictions(images):
    references = reference_predictions(images)
    assert references["majority"][5].tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert references["pixel knn"].argmax(1).tolist() == images.test.labels
    torch.testing.assert_close(references["pixel knn"].sum(1), torch.ones(16))


def test_probe_learns_and_chooses_on_val():
    random = np.random.default_rng(0)
    labels = {name: (np.arange(count) % 3).tolist() for name, count in dict(train=90, val=45, test=60).items()}
    centres = random.normal(size=(3, 8))
    features = {
        name: torch.from_numpy(centres[of] + random.normal(0, 0.3, (len(of), 8))) for name, of in labels.items()
    }
    answers = probe(features["train"], labels["train"], features["val"], labels["val"], features["test"])
    assert answers.keys() == {"linear", "knn"}
    for probabilities in answers.values():
        assert probabilities.shape == (60, 3) and probabilities.dtype == torch.float32
        assert (probabilities.argmax(1) == torch.tensor(labels["test"])).float().mean() > 0.95


def test_number_of_neighbours_is_chosen_on_val():
    random = np.random.default_rng(0)
    truth = [i % 2 for i in range(200)]
    features = torch.from_numpy(np.eye(8)[truth] + random.normal(0, 0.2, (200, 8)))
    noisy = [1 - label if i % 7 == 0 else label for i, label in enumerate(truth)]
    answers = probe(features[:100], noisy[:100], features[100:150], truth[100:150], features[150:])
    assert (answers["knn"].argmax(1) == torch.tensor(truth[150:])).float().mean() > 0.95
    assert not (answers["knn"].max(1).values == 1).all()  # more than one neighbour answers


def test_class_that_train_lacks_has_probability_zero():
    features = torch.randn(12, 4)
    answers = probe(features, [0, 2] * 6, features, [0, 2] * 6, features)
    assert answers["linear"].shape == (12, 3) and answers["linear"][:, 1].tolist() == [0.0] * 12


def test_features_that_are_not_finite():
    with pytest.raises(SaccadeError, match="not all finite"):
        probe(torch.full((4, 2), torch.nan), [0, 1, 0, 1], torch.ones(2, 2), [0, 1], torch.ones(2, 2))


class Grid(nn.Module):
    def forward_features(self, image):
        return image[:, :2] * 2


def test_extract(images):
    bare = nn.Module()
    bare.forward, bare.num_classes = lambda image: image.mean((2, 3)), 0
    options = dict(img_size=4, batch_size=7, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    colours = torch.tensor([picture.getpixel((0, 0)) for picture, _ in images.test]) / 255
    torch.testing.assert_close(extract(bare, images.test, **options), colours)
    torch.testing.assert_close(extract(Grid(), images.test, **options), colours[:, :2] * 2)
    with pytest.raises(SaccadeError, match="Linear has no features to probe: build it with num_classes=0"):
        extract(nn.Linear(3, 3), images.test, **options)


def test_extract_takes_what_the_classifier_sees(images):
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=3)
    model.head.weight.data.normal_()
    options = dict(img_size=8)
    features = extract(model, images.test, **options)
    assert features.shape == (16, 12) and model.num_classes == 3
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    predict_logits(model, images.test, **options)
    torch.testing.assert_close(features, seen[0])
