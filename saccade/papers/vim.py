"""Vision Mamba (Vim): the tokens of an image scanned from both ends.

Mamba sees only what came before. Here the sequence and its reverse, of shared projections (x, z), go each through a
selection of its own (convolution, steps, decays), each gated by its own z,
    out = out_proj((y_forward silu(z) + reversed(y_backward reversed(silu(z)))) / 2).
Both directions run in one scan. The network is plain, of patches of 16 pixels and a class token in the middle of the
sequence; a block is x += mixer(rms_norm(x)), without an MLP.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", 2024,
section 3.3, algorithm 1.

Vim-Ti+ and Vim-S+ take patches of 16 pixels at a stride of 8 (what no patch fills at the end is left out).

Any grid: tokens are taken in row-major order, prefix tokens in their middle, after floor(N / 2) of them; the position
table is resampled (bicubic), images are zero-padded at their end to whole patches.
Quirks kept: the division by two, which the released models have and the paper's algorithm does not (`mean`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within, without_first_axis
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.plain import Plain
from saccade.parts.ssm import MixerTokens, RMSNorm, Selection, scan_together, selection_names, step_rank
from saccade.parts.stem import PatchEmbed

_LONG = "_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_"

CARD = Card(
    "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    authors="Zhu, Liao, Zhang, Wang, Liu, Wang",
    year=2024,
    systems=("survey_ssm_medical",),
    arxiv="2401.09417",
    code="hustvl/Vim@dd0358a",
    licence="Apache-2.0",
    read="paper, code",
    keywords="bidirectional state space model, vision mamba, selective scan, middle class token",
    kinds=("backbone", "mixer"),
    mixers={"bidirectional_mamba": "BidirectionalMamba"},
    params={"vim_tiny": 7e6, "vim_small": 26e6, "vim_base": 98e6, "vim_tiny_plus": 7e6, "vim_small_plus": 26e6},
    top1={"vim_tiny": 76.1, "vim_small": 80.5, "vim_base": 81.9, "vim_tiny_plus": 78.3, "vim_small_plus": 81.6},
    aliases={
        **{f"vim_{size}_patch16_stride8_224": f"vim_{size}_plus" for size in ("tiny", "small")},
        **{f"vim_{size}{_LONG.replace('16', '16_stride8')}midclstok_div2": f"vim_{size}_plus"
           for size in ("tiny", "small")},
        **{f"vim_{size}_patch16_224": f"vim_{size}" for size in ("tiny", "small", "base")},
        **{f"vim_{size}{_LONG}midclstok_div2": f"vim_{size}" for size in ("tiny", "small")},
        f"vim_base{_LONG}middle_cls_token_div2": "vim_base",
    },
    weights={
        f"vim_{size}{plus}": Weights(f"hf:hustvl/Vim-{size}-midclstok/vim_{size[0]}_midclstok_{score}acc.pth",
                                     licence="Apache-2.0")
        for size, plus, score in (("tiny", "", "76p1"), ("small", "", "80p5"), ("base", "", "81p9"),
                                  ("tiny", "_plus", "ft_78p3"), ("small", "_plus", "ft_81p6"))
    },
    goldens=("op_vim_bimamba_v2",),
    tests=("tests/papers/test_vim.py",),
)


class BidirectionalMamba(nn.Module):
    """Mean (sum, without `mean`) of two gated selections, one of them on the reversed sequence: (B, *grid, C) -> same.

    `rank` is the width from which the steps are projected (C / 16 unless given).
    """

    ranks, prefix = (1, 2, 3), True
    projections = ("in_proj", "out_proj")
    template = Template("selective scan: C_i A_(i..j) B_j, both ways", "decays A in (0, 1)", "sum of x, gated")

    def __init__(
        self, site: Site, states: int = 16, kernel: int = 4, expand: float = 2, rank: int | None = None,
        bias: bool = False, mean: bool = True,
    ) -> None:
        super().__init__()
        inner, rank = int(expand * site.dim), step_rank(site.dim) if rank is None else rank
        self.mean = mean
        self.in_proj = nn.Linear(site.dim, 2 * inner, bias=bias)
        self.forwards = Selection(inner, rank, states, kernel)
        self.backwards = Selection(inner, rank, states, kernel)
        self.out_proj = nn.Linear(inner, site.dim, bias=bias)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        tokens = x.flatten(1, -2)
        half = tokens.shape[1] // 2
        if prefix is not None:
            tokens = torch.cat([tokens[:, :half], prefix, tokens[:, half:]], 1)
        inner, gate = self.in_proj(tokens).chunk(2, -1)
        there, back = scan_together([self.forwards, self.backwards], [inner, inner.flip(1)])
        mixed = (there + back.flip(1)) * F.silu(gate)
        out = self.out_proj(mixed / 2 if self.mean else mixed)
        if prefix is None:
            return out.view(x.shape)
        count = prefix.shape[1]
        rest = torch.cat([out[:, :half], out[:, half + count:]], 1)
        return rest.view(x.shape), out[:, half : half + count]

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 3 N C E for the projections around two selections of width E."""
        tokens = prod(grid) + prefix
        selections = self.forwards.cost(tokens) + self.backwards.cost(tokens)
        return tokens * 3 * self.out_proj.weight.numel() + selections

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


SIZES: dict[str, dict[str, Any]] = {
    "vim_tiny": dict(dim=192, depth=24),
    "vim_small": dict(dim=384, depth=24),
    "vim_base": dict(dim=768, depth=24),
    "vim_tiny_plus": dict(dim=192, depth=24, stride=8),
    "vim_small_plus": dict(dim=384, depth=24, stride=8),
    "vim_nano": dict(dim=32, depth=2, patch=4, img_size=32),
}


def vim(
    dim: int, depth: int, patch: int = 16, stride: int | None = None, img_size: int | Sequence[int] = 224,
    in_chans: int = 3, mixer: Any = None, **common: Any,
) -> Plain:
    """A Vision Mamba of a size; patches overlap where `stride` is given and smaller."""
    if stride is not None:
        if not 0 < stride <= patch:
            raise SaccadeError(f"stride={stride}: 1 to {patch}, the side of a patch")
        size = (img_size,) * 2 if isinstance(img_size, int) else tuple(img_size)
        img_size = tuple(max((side - patch) // stride + 1, 1) * stride for side in size)  # a stride a patch
    model = Plain(dim, depth, max(dim // 64, 1), patch=stride or patch, mixer=BidirectionalMamba, block=MixerTokens,
                  norm=RMSNorm, img_size=img_size, in_chans=in_chans, replace=mixer, **common)
    if stride is not None:
        model.stem = PatchEmbed(len(model.grid), in_chans, dim, stride=stride, kernel=patch)
    return model


def middle_first(table: Tensor) -> Tensor:
    """A position table (1, N + 1, C) whose class token is in the middle, with it first."""
    half = (table.shape[1] - 1) // 2
    return torch.cat([table[:, half:half + 1], table[:, :half], table[:, half + 1:]], 1)


MIXER: KeyMap = (
    (r"A_b_log", "backwards.A_log"),
    *selection_names("_b", "backwards"),
    *selection_names("", "forwards"),
)
AUTHORS: KeyMap = (
    ("cls_token", "prefix", without_first_axis),
    ("pos_embed", "position", middle_first),
    (r"patch_embed\.(.*)", r"stem.\1"),
    *within((*MIXER, (r"(.*)", r"\1")), r"layers\.(\d+)\.mixer\.", r"blocks.\1.mixer."),
    (r"layers\.(\d+)\.norm\.(.*)", r"blocks.\1.norm.\2"),
    (r"norm_f\.(.*)", r"norm.\1"),
)
