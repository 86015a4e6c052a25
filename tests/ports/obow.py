"""OBoW's vocabulary, predictor, and both with a student and a teacher, given the words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.keymap import within
from saccade.papers.obow import AUTHORS, OBoW, Predictor, Vocabulary, without_border
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "BoWExtractor":
        return Port(Bag(args["inv_delta"], args["bow_pool"]), key_map(()), outputs=lambda result: result)
    if golden["source"]["object"] == "BoWPredictor":
        widths = args["num_channels_in"]
        module = Spoken(args["num_channels_out"], widths, args["num_channels_hidden"], args["kappa"])
        names = [(rule[0].removeprefix(r"bow_predictor\."), rule[1].removeprefix("predictor."), *rule[2:])
                 for rule in AUTHORS if rule[0].startswith("bow_predictor")]
        return Port(module, key_map(names), outputs=lambda result: {f"out{i}": x for i, x in enumerate(result)})
    module = Recorded(args["arch"], args["num_words"], args["inv_delta"], args["kappa"], args["bow_pool"])
    return Port(module, key_map(within(AUTHORS, r"m\.", "")), outputs=lambda result: result)


def bag_of(x: Tensor, words: Tensor, sharpness: float, pool: str) -> tuple[Tensor, Tensor]:
    vocabulary = Vocabulary(*words.shape, sharpness, pool).to(x.dtype).eval()
    vocabulary.words = words.relu()
    codes = vocabulary.codes(vocabulary.distances(without_border(x)))
    return vocabulary.bag(codes), codes


class Bag(nn.Module):
    def __init__(self, sharpness: float, pool: str) -> None:
        super().__init__()
        self.sharpness, self.pool = sharpness, pool

    def forward(self, x: Tensor, words: Tensor) -> dict[str, Tensor]:
        bag, codes = bag_of(x, words, self.sharpness, self.pool)
        return {"bow": bag, "codes": codes}


class Spoken(Predictor):
    def forward(self, features: Tensor, *words: Tensor) -> list[Tensor]:  # type: ignore[override]
        return super().forward(features, words)


class Recorded(OBoW):
    """The golden hands the words of each map in."""

    def __init__(self, host: str, words: int, sharpness: float, kappa: float, pool: str) -> None:
        super().__init__(create_model(host, num_classes=0), words, 1, sharpness, kappa, pool=pool)
        del self.vocabularies
        for part in self.teacher.modules():  # the golden does not count what is not trained
            for name, value in list(part._parameters.items()):
                delattr(part, name)
                part.register_buffer(name, None if value is None else value.detach())
        self.sharpness, self.pool = sharpness, pool

    def forward(self, image: Tensor, crops: Tensor, *words: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        feature = self.feature(crops)
        found = {"feat": feature[:, :, None, None]}
        maps = self.teacher.features(image)[-2:]
        for level, guess in enumerate(self.predictor(feature, [one.relu() for one in words])):
            with torch.no_grad():
                bag, _ = bag_of(maps[level], words[level], self.sharpness, self.pool)
            found |= {f"logits{level}": guess, f"target{level}": bag}
        return found
