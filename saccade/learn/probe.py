"""What can be had without training a network: simple classifiers on frozen features, on pixels, on nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.optional import optional
from saccade.learn.features import features
from saccade.learn.train import Recipe, outputs
from saccade.learn.transforms import Squares

if TYPE_CHECKING:
    from saccade.learn.data import ImageSet, Split

dummy = optional("sklearn.dummy", extra="train")
linear_model = optional("sklearn.linear_model", extra="train")
neighbors = optional("sklearn.neighbors", extra="train")
pipeline = optional("sklearn.pipeline", extra="train")
preprocessing = optional("sklearn.preprocessing", extra="train")

PENALTIES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # C of the linear classifier, strongest penalty first
NEIGHBOURS = (1, 3, 5, 10, 20)
NEVER = -1e4  # the score of a class that no training picture has
PIXELS = 32  # side of the squares whose pixels are compared


def extract(
    model: nn.Module,
    split: Split,
    *,
    img_size: int,
    batch_size: int = 64,
    mean: tuple[float, float, float] = Recipe.mean,
    std: tuple[float, float, float] = Recipe.std,
) -> Tensor:
    """(N, D) float32: what the model, put in eval mode, hands to its classifier for each picture; the model is kept.

    That is model(x) where num_classes is 0; else of a copy after `reset_classifier(0)`; else `forward_features(x)`,
    averaged over the grid (B, D, *grid) or the tokens (B, N, D). Raises SaccadeError where a model has none of these.
    """
    if getattr(model, "num_classes", None) != 0 and hasattr(model, "reset_classifier"):
        model = deepcopy(model)
        model.reset_classifier(0)  # type: ignore[operator]
    return outputs(_Features(model), Squares(split, img_size), batch_size, mean, std)


def probe(
    features_train: Tensor,
    labels_train: list[int],
    features_val: Tensor,
    labels_val: list[int],
    features_test: Tensor,
) -> dict[str, Tensor]:
    """Probabilities (N, classes) of the test pictures from features (N, D), by "linear" and by "knn".

    Logistic regression on standardised features and cosine nearest neighbours, fitted on train; the penalty and the
    number of neighbours are those with the highest accuracy on val. Raises SaccadeError where a feature is not finite.
    """
    head = linear_probe(features_train, labels_train, features_val, labels_val)
    with torch.no_grad():
        linear = head(features_test.float()).softmax(-1)
    return {"linear": linear,
            "knn": neighbour_probe(features_train, labels_train, features_val, labels_val, features_test)}


def linear_probe(
    features_train: Tensor, labels_train: list[int], features_val: Tensor, labels_val: list[int]
) -> nn.Linear:
    """The linear classifier of `probe` as one layer, (N, D) -> scores (N, classes): it has the standardising in it."""
    train, val = _finite(features_train, features_val)
    candidates = (
        pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(C=C, max_iter=1000))
        for C in PENALTIES
    )
    scaler, regression = _fitted(candidates, train, labels_train, val, labels_val)
    weight, bias = regression.coef_ / scaler.scale_, regression.intercept_
    bias = bias - weight @ scaler.mean_
    if len(weight) == 1:  # of two classes the score of the second
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], max(*labels_train, *labels_val) + 1)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(NEVER)
        head.weight[regression.classes_] = torch.from_numpy(weight).float()
        head.bias[regression.classes_] = torch.from_numpy(bias).float()
    return head


def neighbour_probe(
    features_train: Tensor, labels_train: list[int], features_val: Tensor, labels_val: list[int], features_test: Tensor
) -> Tensor:
    """The cosine nearest neighbours of `probe`: probabilities (N, classes) of the test pictures."""
    train, val, test = _finite(features_train, features_val, features_test)
    chosen = _fitted(_neighbours("cosine", len(train)), train, labels_train, val, labels_val)
    return _probabilities(chosen, test, max(*labels_train, *labels_val) + 1)


class Probed(nn.Module):
    """A network whose features a linear classifier reads: image -> scores (B, classes)."""

    def __init__(self, network: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(features(self.network, image))
        return scores


def reference_predictions(images: ImageSet) -> dict[str, Tensor]:
    """Probabilities (N, classes) of the test pictures by what any network must beat: "majority" and "pixel knn".

    "majority" answers with the frequencies of the classes in train; "pixel knn" compares 32 x 32 pixels by their
    Euclidean distance, its number of neighbours chosen on val.
    """
    train, val, test = (
        torch.cat([pixels for pixels, _ in Squares(split, PIXELS).loader(256)]).flatten(1).numpy().astype(np.float32)
        for split in (images.train, images.val, images.test)
    )
    known, held_out = images.train.labels, images.val.labels
    classes = max(*known, *held_out) + 1
    knn = _fitted(_neighbours("euclidean", len(train)), train, known, val, held_out)
    return {
        "majority": _probabilities(dummy.DummyClassifier().fit(train, known), test, classes),
        "pixel knn": _probabilities(knn, test, classes),
    }


class _Features(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return features(self.model, image)


def _neighbours(metric: str, known: int) -> list[Any]:
    return [
        neighbors.KNeighborsClassifier(count, weights="distance", metric=metric)
        for count in NEIGHBOURS
        if count <= known
    ]


def _finite(*features: Tensor) -> list[NDArray[np.float32]]:
    found = [np.asarray(each, np.float32) for each in features]
    if not all(np.isfinite(each).all() for each in found):
        raise SaccadeError("the features to probe are not all finite: the model's weights are broken or do not fit it")
    return found


def _fitted(
    candidates: Iterable[Any],
    train: NDArray[np.float32],
    labels_train: list[int],
    val: NDArray[np.float32],
    labels_val: list[int],
) -> Any:
    """The first candidate that no other beats on val."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # a weak penalty; val judges the result
        fitted = [candidate.fit(train, labels_train) for candidate in candidates]
    return max(fitted, key=lambda candidate: candidate.score(val, labels_val))


def _probabilities(classifier: Any, test: NDArray[np.float32], classes: int) -> Tensor:
    """(N, classes)."""
    found = torch.zeros(len(test), classes)
    found[:, torch.from_numpy(classifier.classes_)] = torch.from_numpy(classifier.predict_proba(test)).float()
    return found
