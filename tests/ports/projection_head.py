"""The fixed head, the symmetric ReLU and the supervised contrastive loss, together as they were recorded."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from saccade.papers.projection_head import ReweightingHead, SymmetricRelu
from saccade.parts.losses import supervised_contrastive
from tests.ports.port import Port, key_map


class Recorded(nn.Module):
    def __init__(self, dim: int, kappa: float, temperature: float, labels: list[int]) -> None:
        super().__init__()
        self.head, self.relu = ReweightingHead(dim, kappa), SymmetricRelu()
        self.temperature, self.labels = temperature, torch.tensor(labels)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        labels = self.labels.repeat(len(z) // len(self.labels))
        weighed = self.head(z)
        losses = [supervised_contrastive(each, labels, self.temperature) for each in (z, weighed)]
        return {"loss": torch.stack(losses), "reweighted": weighed, "symmetric_relu": self.relu(z)}


def build(golden: dict) -> Port:
    """The settings stand in the object's name and the labels in the note."""
    dim, kappa = re.search(r"ReweightProjectionHead\((\d+),([\d.]+)\)", golden["source"]["object"]).groups()
    temperature = re.search(r"SupConLoss\(([\d.]+)", golden["source"]["object"])[1]
    labels = [int(label) for label in re.search(r"labels ([\d,]+)", golden["note"])[1].split(",")]
    rules = ((r"head\.reweights", "head.weights"), (r"sr\.b", "relu.b"))
    module = Recorded(int(dim), float(kappa), float(temperature), labels)
    return Port(module, key_map(rules), outputs=lambda result: result)
