"""MultiMAE with given masks, and its transformer of several modalities as a classifier."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from saccade.core.keymap import Dropped, within
from saccade.papers.multimae import AUTHORS, DECODERS, MultiMAE, multimae
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    size = {"dim": args["dim_tokens"], "depth": args["depth"], "heads": args["num_heads"],
            "modalities": args["in_domains"], "img_size": args.get("image_size", 224)}
    names = list(golden["inputs"])
    if golden["source"]["object"] == "MultiViT":
        classes = int(re.search(r"\((\d+)\)", args["output"])[1])
        module = Named(multimae(**size, num_classes=classes), names)
        return Port(module, key_map((*within(AUTHORS, "", "model."),)), outputs=lambda result: {"cls": result})
    model = multimae(**size, num_classes=0)
    del model.head_norm
    method = MultiMAE(model, dim=args["decoder_dim"], depth=args["decoder_depth"], heads=args["decoder_num_heads"])
    ours = [rule for rule in within(AUTHORS, "", "model.") if not isinstance(rule, Dropped)]
    placed = [(rule[0], f"method.{rule[1]}", *rule[2:]) for rule in (*DECODERS, *ours)]
    return Port(Masked(method, names), key_map(placed), outputs=lambda result: result)


class Named(nn.Module):
    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(dict(zip(self.names, inputs, strict=True)))


class Masked(nn.Module):
    """Token j of the i-th modality is visible where j % 6 == i."""

    def __init__(self, method: MultiMAE, names: list[str]) -> None:
        super().__init__()
        self.method, self.names = method, names

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        given = dict(zip(self.names, inputs, strict=True))
        grid = tuple(side // self.method.model.patch for side in given["rgb"].shape[2:])
        count = torch.Size(grid).numel()
        seen = torch.cat([i * count + torch.arange(i, count, 6) for i in range(len(given))])
        guesses, _ = self.method.guesses(given, seen.expand(len(inputs[0]), -1))
        return self.method.pictures(guesses, grid)
