"""The authors' layer rules, with the relevance at the input of every layer."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from saccade import Site
from saccade.parts.relevance import RelevanceRules
from tests.ports.port import Port, key_map

KINDS = {
    r"conv (\d+)-(\d+) k(\d+)(?: s(\d+))?(?: p(\d+))?": lambda a, b, k, s, p: nn.Conv2d(
        int(a), int(b), int(k), int(s or 1), int(p or 0)),
    r"pool (\d+)/(\d+)": lambda k, s: nn.MaxPool2d(int(k), int(s)),
    r"linear (\d+)": lambda out: nn.LazyLinear(int(out)),
    r"relu": nn.ReLU,
    r"flatten": nn.Flatten,
}


class Layers(nn.Module):
    """A chain whose layers' inputs are told, and their relevance for the highest score."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with RelevanceRules("mixed"), torch.enable_grad():
            states = [x if x.requires_grad else x.requires_grad_()]
            for layer in self.layers:
                states.append(layer(states[-1]))
            logits = states[-1]
            start = logits * nn.functional.one_hot(logits.argmax(1), logits.shape[1])
            slopes = torch.autograd.grad(start.sum(), states[:-1])
        found = {f"R_{number}": (state * slope).detach()
                 for number, (state, slope) in enumerate(zip(states, slopes, strict=False))}
        return found | {"R_input": found["R_0"], "R_out": start.detach(), "logits": logits.detach()}


    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Every layer forwards and back, and the positive weights of the linear ones forwards."""
        x, total = torch.zeros(1, grid[0], grid[1], site.dim), 0
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                total += 2 * layer.weight.numel() * x[0, 0].numel()
            elif isinstance(layer, nn.Linear):
                total += 3 * layer.weight.numel()
        return total


def build(golden: dict) -> Port:
    layers = []
    for word in golden["source"]["args"]["net"].split(", "):
        kind, make = next((found, make) for rule, make in KINDS.items() if (found := re.fullmatch(rule, word)))
        layers.append(make(*kind.groups()))
    module = Layers(layers)
    module.layers(torch.zeros(golden["inputs"]["x"]["shape"]))
    return Port(module, key_map(((r"(.*)", r"\1"),)), outputs=lambda found: {name: found[name]
                                                                             for name in golden["outputs"]})
