"""TokenFormer: parameters are tokens too, so a trained network grows by taking in more of them.

Every linear layer becomes an attention of the token (the query) to n learned pairs of keys and values,
    out = theta(x K^T) V,   theta(s) = gelu(tau s / |s|_2),   K (n, C), V (n, C'), tau = sqrt(n),
so its width is bound to n no longer by the shapes of its neighbours. Pairs whose keys are zero add nothing: appended to
a trained layer, they leave its output as it is and learn from there. q, k, v and the projection of self-attention are
four such layers, the feed-forward network is one.

Wang, Fan, Naeem, Xian, Lenssen, Wang, Tombari, Schiele, "TokenFormer: Rethinking Transformer Scaling with Tokenized
Model Parameters", 2024, sections 3.2 and 3.3.

Any grid: nothing but the position table of the backbone belongs to a grid.
Quirks kept: the norms of a block have no parameters; the language model turns a quarter of each head's channels. Not
kept: the authors' code takes tau from the grown n, which changes outputs as a model grows; ours keeps the first n's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.names import closest, match_modules
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.rotary import rotate_halves
from saccade.parts.attention import check_heads
from saccade.parts.block import Norm
from saccade.parts.plain import Plain, TokenBlock
from saccade.parts.tokens import causal, global_tokens, join, split

CARD = Card(
    "TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters",
    authors="Wang, Fan, Naeem, Xian, Lenssen, Wang, Tombari, Schiele",
    year=2024,
    systems=("tokenformer",),
    arxiv="2410.23168",
    code="Haiyang-W/TokenFormer@4d56c73",
    licence="Apache-2.0",
    read="paper, code",
    keywords="token-parameter attention, Pattention, parameters as tokens, growing a model, incremental scaling",
    kinds=("backbone", "mixer"),
    mixers={"tokenformer_attention": "TokenformerAttention"},
    goldens=("op_pattention_l2_norm_gelu", "op_pattention_gelu_l2_norm", "op_pattention_softmax",
             "op_tokenformer_attention", "tokenformer_layer"),
    tests=("tests/papers/test_tokenformer.py",),
)


def norm_then_gelu(scores: Tensor, pairs: int) -> Tensor:
    """gelu(sqrt(n) s / |s|)."""
    return F.gelu(unit(scores) * pairs**0.5)


def gelu_then_norm(scores: Tensor, pairs: int) -> Tensor:
    """sqrt(n) g / |g|, g = gelu(s)."""
    return unit(F.gelu(scores)) * pairs**0.5


def scaled_softmax(scores: Tensor, pairs: int) -> Tensor:
    """n softmax(s)."""
    return scores.softmax(-1) * pairs


def unit(x: Tensor) -> Tensor:
    """x / |x|, and 0 for 0 (where the authors' code divides by zero)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


FORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "l2_norm_gelu": norm_then_gelu, "gelu_l2_norm": gelu_then_norm, "softmax": scaled_softmax,
}


class Pattention(nn.Module):
    """theta(x K^T) V with `pairs` learned keys and values: (..., in_dim) -> (..., out_dim).

    `form` is the theta: "l2_norm_gelu" (the published models'), "gelu_l2_norm" or "softmax". `grown` further pairs,
    whose keys start at zero, change the output only once they have learned; a checkpoint without them loads.
    """

    def __init__(
        self, in_dim: int, out_dim: int, pairs: int, form: str = "l2_norm_gelu", grown: int = 0
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise SaccadeError(f"form={form!r}: choose one of {sorted(FORMS)}{closest(form, FORMS)}")
        self.pairs, self.form = pairs, form
        self.keys = nn.Parameter(torch.randn(pairs, in_dim) * 0.02)
        self.values = nn.Parameter(torch.randn(pairs, out_dim) * 0.02)
        if grown:
            self.grow(grown)

    def forward(self, x: Tensor) -> Tensor:
        return FORMS[self.form](F.linear(x, self.keys), self.pairs) @ self.values

    def grow(self, more: int) -> None:
        """Append `more` pairs; the output stays."""
        if self.form == "softmax" or more < 1:
            raise SaccadeError(f'{more} more pairs under form={self.form!r}: give at least 1; with "softmax" no key is '
                               'without weight, so outputs would change: build with "l2_norm_gelu" or "gelu_l2_norm"')
        keys, values = self.keys.detach(), self.values.detach()
        self.keys = nn.Parameter(torch.cat([keys, keys.new_zeros(more, keys.shape[1])]))
        self.values = nn.Parameter(torch.cat([values, torch.randn_like(values[:1].expand(more, -1)) * 0.02]))

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The pairs of a checkpoint from before the growth, with the new ones after them."""
        own = self.keys if parameter == "keys" else self.values
        if not self.pairs <= value.shape[0] < own.shape[0]:
            return value
        new = own.detach()[value.shape[0]:]
        return torch.cat([value, torch.zeros_like(new) if parameter == "keys" else new])

    def extra_repr(self) -> str:
        return f"{self.keys.shape[1]}, {self.values.shape[1]}, pairs={self.keys.shape[0]}, form={self.form!r}"


def grow(model: nn.Module, more: int, layers: str = "*") -> int:
    """Append `more` pairs to each `Pattention` whose name the pattern picks, outputs unchanged; returns how many grew.

    Their parameters are new objects: make the optimizer afterwards. (Wang et al., TokenFormer, 2024, section 3.3.)
    """
    named = dict(model.named_modules())
    chosen = [module for name in match_modules(model, layers) if isinstance(module := named[name], Pattention)]
    if not chosen:
        raise SaccadeError(f"{layers!r} picks no Pattention layer of this {type(model).__name__}: nothing can grow")
    for layer in chosen:
        layer.grow(more)
    return len(chosen)


class TokenformerAttention(nn.Module):
    """Self-attention whose four projections attend to parameter tokens: (B, *grid, C) -> (B, *grid, C).

    `pairs` are those of q, k and v each and those of the projection: three quarters of the width unless given. The
    language model is `causal` and turns the share `rotary` of each head's channels.
    """

    ranks, prefix, weights = (1, 2, 3), True, True
    template = Template(
        "q k^T / sqrt(d), q, k, v by attention to parameters",
        "softmax; gelu of normed scores to parameters",
        "sum of v",
    )

    def __init__(
        self,
        site: Site,
        pairs: tuple[int, int] | None = None,
        grown: tuple[int, int] = (0, 0),
        form: str = "l2_norm_gelu",
        causal: bool = False,
        rotary: float = 0.0,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        turned = int(check_heads(site) * rotary)
        if turned % 2:
            raise SaccadeError(f"rotary={rotary} turns {turned} channels of each head: they are turned in pairs")
        inner, outer = (site.dim * 3 // 4,) * 2 if pairs is None else pairs
        self.heads, self.causal, self.turned, self.base = site.heads, causal, turned, base
        self.query, self.key, self.value = (Pattention(site.dim, site.dim, inner, form, grown[0]) for _ in range(3))
        self.proj = Pattention(site.dim, site.dim, outer, form, grown[1])

    @overload
    def forward(self, x: Tensor, prefix: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        tokens = join(x, prefix)
        count = tokens.shape[1]
        q, k, v = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))
        if self.turned:
            q, k = rotate_halves(q, self.turned, self.base), rotate_halves(k, self.turned, self.base)
        mask = causal(count, x.device, q.dtype) if self.causal else None
        out = attend(q, k, v, mask, where=lambda: global_tokens(count, x.device))
        return split(self.proj(out.transpose(1, 2).flatten(2)), x, prefix)

    def reach(self, site: Site) -> None:
        """Every token reaches every other (every later one, where it is causal)."""
        return None

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: one a parameter and token, 2 N^2 C for the products with N tokens."""
        tokens = torch.Size(grid).numel() + prefix
        return tokens * sum(weight.numel() for weight in self.parameters()) + 2 * tokens**2 * site.dim


NORM: Norm = partial(nn.LayerNorm, eps=1e-5, elementwise_affine=False)

# As many pairs as give a ViT's count of parameters: 16 n C = 12 C^2.
SIZES: dict[str, dict[str, Any]] = {
    "tokenformer_base": dict(dim=768, depth=12, heads=12, pairs=(576, 576, 2304)),
    "tokenformer_large": dict(dim=1024, depth=24, heads=16, pairs=(768, 768, 3072)),
    "tokenformer_nano": dict(dim=64, depth=4, heads=2, pairs=(48, 48, 192), patch=4, img_size=32),
}


def tokenformer(
    dim: int,
    depth: int,
    heads: int,
    pairs: tuple[int, int, int],
    grown: tuple[int, int, int] = (0, 0, 0),
    form: str = "l2_norm_gelu",
    patch: int = 16,
    mixer: Any = None,
    **common: Any,
) -> Plain:
    """A ViT of Pattention layers with `pairs` for q, k, v, for the projection and for the feed-forward network.

    `grown` more of each let it take a checkpoint of the model without them, outputs unchanged.
    """

    def block(site: Site, mixer: nn.Module, drop_path: float, norm: Norm) -> TokenBlock:
        return TokenBlock(site, mixer, drop_path=drop_path, norm=NORM,
                          mlp=lambda width: Pattention(width, width, pairs[2], form, grown[2]))

    own = partial(TokenformerAttention, pairs=pairs[:2], grown=grown[:2], form=form)
    return Plain(dim, depth, heads, patch=patch, mixer=own, block=block, replace=mixer, **common)


# The authors' names of a layer, of an attention and of a Pattention; they have published no vision model.
AUTHORS: KeyMap = (
    (r"attention\.(\w+)\.(key|value)_param_tokens", r"mixer.\1.\2s"),
    (r"((?:\w+\.)?)(key|value)_param_tokens", r"\1\2s"),
)
