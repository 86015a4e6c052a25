"""Adversarial training of the attention over words, plain and interpretable as released, with what all passes give."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import Site
from saccade.papers.attention_iat import AUTHORS, WordAttention, adversarial_loss
from tests.ports.port import Port, State, key_map

FORM = {"TanhBCAttentionAT": "at", "TanhBCAttentioniAT": "released_iat"}
POSITIVE = 2.0  # what a yes weighs; labels, mask and this are of the recording, and told in the golden's note


class Training(nn.Module):
    def __init__(self, dim: int, size: float, form: str) -> None:
        super().__init__()
        self.attention, self.out = WordAttention(dim), nn.Linear(dim, 1)
        self.size, self.form = size, form

    def forward(self, hidden: Tensor) -> State:
        labels = (torch.arange(len(hidden)) % 2 == 0).to(hidden.dtype)
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
        valid[1, -3:] = valid[2, -1:] = False
        passes: list[tuple[Tensor, Tensor]] = []
        weight = hidden.new_tensor(POSITIVE)

        def loss() -> Tensor:
            attention = self.attention(hidden, valid)
            passes.append((attention, self.out((attention[:, None] @ hidden)[:, 0])[:, 0]))
            return F.binary_cross_entropy_with_logits(passes[-1][1], labels, pos_weight=weight, reduction="sum")

        found = adversarial_loss(self, loss, self.size, form=self.form)
        return {"attention": passes[0][0], "attention_adv": passes[1][0],
                "d_grad": found.slopes["attention"][0][:, 0, 0],
                "losses": torch.stack([found.clean, found.clean, found.adversarial]),
                "logits": torch.stack([logits for _, logits in passes])}

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """What the golden counted: the layers of three forward passes and of one backward, weighted sums as none."""
        scores, C = grid[0] * (site.dim // 2), site.dim
        return 3 * (scores * C + scores + C) + scores * C + 2 * scores + 2 * C


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    return Port(Training(args["hidden_size"], args["xi"], FORM[golden["source"]["object"]]), key_map(AUTHORS))
