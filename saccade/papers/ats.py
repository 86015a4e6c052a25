"""ATS: each picture decides how many tokens it needs, by sampling them from their significance.

In a block, a grid token is as significant as the class token looks at it and as its value is long,
    s_i = sum over heads of softmax(q_class k^T / sqrt(d))_i |v_i|,
normalised to a sum of one. Sorted ascending, the running sum of s is a distribution function; it is asked at equal
steps for the token nearest to each (inverse transform sampling, without randomness). Tokens that are asked for twice
stay once: the fewer stand out, the fewer stay. Only these ask in the attention, all tokens answer.

Fayyaz, Abbasi Koohpayegani, Rezaei Jafari, Sengupta, Vaezi Joze, Sommerlade, Pirsiavash, Gall, "Adaptive Token Sampling
For Efficient Vision Transformers", 2022, section 3.

Pictures of a batch keep different numbers of tokens: they are packed to the longest, zeros behind shorter ones masked.
Any host of prefix and grid tokens; prefix tokens always stay, and the first of them ranks. Kept tokens stand in rising
order of significance. Quirks: the token of least significance is never met; in the authors' code the zeros of a padded
picture are candidates too, so that its tokens depend on its batch (`padding_counts`: in the models of SIZES, not in
`apply`). Their softmax adds 1e-6 / N to each weight; ours does not (differences of 1e-6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap
from saccade.core.swap import Handle
from saccade.ops.attend import attend
from saccade.parts.host import HostBlock, chosen_layers, class_attention, gathered, open_blocks, packed
from saccade.parts.plain import DEIT, DEIT_SIZES, Plain

CARD = Card(
    "Adaptive Token Sampling For Efficient Vision Transformers",
    authors="Fayyaz, Abbasi Koohpayegani, Rezaei Jafari, Sengupta, Vaezi Joze, Sommerlade, Pirsiavash, Gall",
    year=2022,
    systems=("ats",),
    arxiv="2111.15667",
    code="adaptivetokensampling/ATS@9271257",
    licence="Apache-2.0",
    read="paper, code",
    keywords="adaptive token sampling, inverse transform sampling, significance score, dynamic number of tokens",
    kinds=("token reduction", "backbone"),
    methods={"ats": "ats"},
    params={"ats_deit_small": 22.1e6},
    macs={"ats_deit_small": 2.9e9},
    top1={"ats_deit_small": 79.7},
    weights={"ats_deit_small": Weights(  # DeiT's, unchanged
        "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth", "cd65a155", licence="Apache-2.0")},
    goldens=("ats_deit_small", "ats_deit_tiny", "op_ats_block"),
    tests=("tests/papers/test_ats.py",),
)


class AtsBlock(HostBlock):
    """A block that asks the distribution of its grid tokens at `samples` steps and keeps those met; at 0, all stay."""

    def __init__(self, samples: int, padding_counts: bool, **host: Any) -> None:
        super().__init__(**host)
        self.samples, self.padding_counts = samples, padding_counts

    def drops(self) -> bool:
        return self.samples > 0

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.start(tokens)
        before, (q, k, v) = self.kept.numbers, self.queries_keys_values(tokens)
        bias = self.kept.padding_bias(q)
        if self.samples:
            index, real = self.sample(class_attention(q, k, self.prefix, bias), v)
            tokens, q = gathered(tokens, index), gathered(q.transpose(1, 2).flatten(2), index)
            q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)
            self.kept.choose(index, real=real)
        real = (self.kept.numbers >= 0)[..., None]
        tokens = self.add_mixed(tokens, attend(q, k, v, bias, where=lambda: (self.kept.numbers, before))) * real
        return self.add_mlp(tokens) * real

    def sample(self, attention: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention (B, N) of the grid tokens and values (B, heads, P + N, d) -> places (B, P + M), and which are real.

        M is the largest number of grid tokens that a picture of the batch keeps.
        """
        score = attention * v[:, :, self.prefix:].transpose(1, 2).flatten(2).norm(dim=-1)
        score, order = (score / score.sum(1, keepdim=True)).sort(1)
        total = score.cumsum(1)
        low = total[:, :1] if self.padding_counts else total.masked_fill(score <= 0, torch.inf).amin(1, keepdim=True)
        high = total[:, -1:]
        share = (total - low) / (high - low)
        first = share.masked_fill(share <= 0, torch.inf).min(1, keepdim=True).values  # asked from there to 1
        asked = first + (1 - first) * torch.linspace(0, 1, self.samples, device=share.device, dtype=share.dtype)
        above = torch.searchsorted(share, asked).clamp(1, share.shape[1] - 1)
        nearer_below = asked - share.gather(1, above - 1) <= share.gather(1, above) - asked
        met = torch.zeros_like(share, dtype=torch.bool).scatter(1, above - nearer_below.long(), True)
        place, real = packed(met)
        return self.after_prefix(order.gather(1, place)), F.pad(real, [self.prefix, 0], value=True)


LAYERS = (3, 4, 5, 6, 7, 8, 9, 10, 11)


def ats(
    model: nn.Module, samples: int = 196, layers: Sequence[int] | None = None, padding_counts: bool = False
) -> Handle:
    """Sample the grid tokens at `samples` steps in each of the blocks `layers`: at most so many stay.

    By default 3 to 11 of 12 blocks, at the same shares of another depth.
    """
    if samples < 2:
        raise SaccadeError(f"ats: samples={samples}; give at least 2 steps")
    chosen = chosen_layers(model, "ats", layers, LAYERS)

    def build(number: int, **host: Any) -> nn.Module:
        return AtsBlock(samples * (number in chosen), padding_counts, **host)

    return open_blocks(model, "ats", build, needs_class_token=True)


SIZES: dict[str, dict[str, Any]] = {
    f"ats_deit_{size}": dict(shape, builder="ats_deit") for size, shape in DEIT_SIZES.items()
}


def ats_deit(
    dim: int, depth: int, heads: int, samples: int = 196, layers: Sequence[int] = LAYERS, patch: int = 16,
    mixer: Any = None, **common: Any,
) -> Plain:
    """A DeiT of a size with ATS applied, padding counted as by its authors."""
    model = Plain(dim, depth, heads, patch=patch, replace=mixer, **common)
    ats(model, samples, layers, padding_counts=True)
    return model


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """The blocks that a golden was recorded with."""
    return dict(layers=tuple(golden["source"]["args"]["ATS_BLOCKS"]))


AUTHORS: KeyMap = (Dropped(r"blocks\.\d+\.attn\.out_zero_mask", "a constant of zeros"), *DEIT)
TAPS = {r"block(\d+)": r"blocks.\1"}
