"""The authors' BERT encoder and GPT layer, their decompositions batched along the pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.keymap import KeyMap
from saccade.core.record import record
from saccade.papers.cd_t import Parts, through
from saccade.parts.opened import ROLES, Layer
from tests.ports.port import Port, key_map

GPT: KeyMap = (
    (r"ln(\d)\.w", r"block.norm\1.weight"),
    (r"ln(\d)\.b", r"block.norm\1.bias"),
    (r"attn\.W_O", "block.out.weight", lambda weight: weight.flatten(0, 1).T),
    (r"attn\.b_O", "block.out.bias"),
    *((rf"attn\.W_{one}", f"block.{one.lower()}.weight", lambda weight: weight.transpose(1, 2).flatten(0, 1))
      for one in "QKV"),
    *((rf"attn\.b_{one}", f"block.{one.lower()}.bias", torch.flatten) for one in "QKV"),
    (r"mlp\.W_in", "block.fc1.weight", torch.t),
    (r"mlp\.b_in", "block.fc1.bias"),
    (r"mlp\.W_out", "block.fc2.weight", torch.t),
    (r"mlp\.b_out", "block.fc2.bias"),
)
KEPT = (((0, 1), (0, 2)), ((1, 4),))  # the relevant tokens of BERT's two inputs
SOURCES = (((1, 3),), ((0, 5), (2, 2)))  # heads and positions of GPT's
REL = 0.3  # of the input counts: the note does not say so, the outputs do


class Block(nn.Module):
    """A layer's modules by their roles."""

    def __init__(self, dim: int, hidden: int, heads: int, eps: float, tanh: bool, post: bool) -> None:
        super().__init__()
        for role in ("q", "k", "v", "out"):
            self.add_module(role, nn.Linear(dim, dim))
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.activation = nn.GELU("tanh" if tanh else "none")
        self.heads, self.post = heads, post

    def forward(self, x: Parts, mask: Tensor, edit: Any = lambda kind, part: part) -> Parts:
        modules = {role: getattr(self, role) for role in ROLES if hasattr(self, role)}
        return through(x, Layer(modules, self.heads, self.post), mask, not self.post, edit)


class Bert(nn.Module):
    def __init__(self, dim: int, heads: int, intermediate: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dim, intermediate, heads, 1e-12, False, True) for _ in range(layers))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        chosen = torch.zeros(*x.shape[:2], 1, dtype=torch.bool)
        for one, token in sum(KEPT, ()):
            chosen[one, token] = True
        mask = torch.zeros(x.shape[0], 1, 1, x.shape[1], dtype=x.dtype)
        mask[1, ..., -2:] = torch.finfo(x.dtype).min
        found = Parts(torch.where(chosen, x, 0)[None], torch.where(chosen, 0, x)[None])
        for block in self.layers:
            found = block(found, mask.to(x.device))
        return {"rel": found.rel[0], "irrel": found.irrel[0], "total": found.total[0]}


class Gpt(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.block = Block(dim, hidden, heads, 1e-8, True, False)

    def forward(self, rel: Tensor, irrel: Tensor, mean: Tensor) -> dict[str, Tensor]:
        tokens, heads = rel.shape[1], self.block.heads
        future = torch.ones(tokens, tokens).triu(1)
        mask = torch.zeros_like(future).masked_fill(future > 0, torch.finfo(rel.dtype).min).to(rel.device)
        mean = mean.unflatten(-1, (heads, -1))

        def edit(kind: str, x: Parts) -> Parts:
            if kind == "heads":
                x = x.each(Tensor.clone)
                for one, nodes in enumerate(SOURCES):
                    for head, position in nodes:
                        at = (0, one, position, head)
                        x.rel[at] = x.rel[at] + x.irrel[at] - mean[position, head]
                        x.irrel[at] = mean[position, head]
            return x

        with record(self) as weights:
            found = self.block(Parts(REL * rel[None], irrel[None]), mask, edit)
        return {"rel": found.rel[0], "irrel": found.irrel[0], "total": found.total[0],
                "attention": weights["block"].parts[1].weights[0]}  # those of the sum come after those of rel


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if "layers" in args:
        rules = tuple((rf"layer\.(\d+)\.{theirs}\.(.*)", rf"layers.\1.{ours}.\2") for ours, theirs in (
            ("q", r"attention\.self\.query"), ("k", r"attention\.self\.key"), ("v", r"attention\.self\.value"),
            ("out", r"attention\.output\.dense"), ("norm1", r"attention\.output\.LayerNorm"),
            ("fc1", r"intermediate\.dense"), ("fc2", r"output\.dense"), ("norm2", r"output\.LayerNorm")))
        return Port(Bert(**args), key_map(rules), outputs=lambda found: found)
    return Port(Gpt(**args), key_map(GPT), outputs=lambda found: found)
