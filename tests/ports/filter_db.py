"""The statistics of one filled layer, some of its filters made small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade import Site
from saccade.papers.filter_db import filter_quality
from tests.ports.port import Port, key_map


class Layer(nn.Module):
    def __init__(self, out_channels: int, in_channels: int, every: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.every = every

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return self.weight.shape[0] * self.weight.numel()  # the products of all pairs of output channels

    def forward(self, unused: Tensor) -> dict[str, Tensor]:
        weight = self.weight.detach().clone().flatten(0, 1)
        weight[:: self.every] *= 1e-4
        found = filter_quality(weight.view_as(self.weight))
        ratios = (found.sparsity, found.entropy, found.normalised_entropy, found.live_entropy,
                  found.normalised_live_entropy, found.orthogonality)
        norms = found.standardised_l2, found.standardised_l1, found.l2, found.l1
        return {"ratios": torch.tensor(ratios), "norms": torch.tensor(norms)}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    layer = Layer(args["out_channels"], args["in_channels"], args["KILL"])
    return Port(layer, key_map(((r"conv\.weight", "weight"),)), outputs=lambda result: result)
