"""Sparsifiner: predict cheaply which tokens each token will look at, and attend to these alone.

A predictor beside every attention writes the map as a product of two thin matrices. A learned matrix E sums the N keys
up in M; queries look at these sums, keep their strongest few, and another learned matrix D spreads them over the keys,
    A ~ top_b(softmax(q' (E^T k')^T / sqrt(h))) |D|^T,   q', k' = q, k in a fraction of their channels.
Each row keeps its ceil(keep N) largest entries, and softmax(q k^T / sqrt(d)) is computed at these alone; the class
token sees all. The predictor is the same for all h heads.

Wei, Duke, Jiang, Aarabi, Taylor, Shkurti, "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient
Vision Transformers", 2023, section 3.

E and D belong to the tokens of the native grid and are resampled (bicubic) for another. The authors compute the dense
map and mask it; ours computes the kept entries alone, as products with a sparse matrix on a CPU and with gathered keys
elsewhere, and masks while watched or in training. What is saved is less than what finding the largest entries costs:
in time the host is faster.
Quirks kept: the predictor's scale counts heads, not channels; entries of |D| up to 0.02 are 0. Not here: the pruning of
whole tokens that their code can add.
"""

from __future__ import annotations

import warnings
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import recording
from saccade.core.swap import Handle
from saccade.ops.attend import affinity, attend
from saccade.parts.host import HostBlock, check_rate, heads_of, native_grid, open_blocks
from saccade.parts.plain import DEIT, DEIT_SIZES, Plain
from saccade.parts.position import resample

CARD = Card(
    "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    authors="Wei, Duke, Jiang, Aarabi, Taylor, Shkurti",
    year=2023,
    systems=("sparsifiner",),
    arxiv="2303.13755",
    code="lim142857/Sparsifiner@9a11e26",
    licence="MIT",
    read="paper, code",
    keywords="sparse attention, predicted connectivity mask, low-rank attention approximation, instance-dependent",
    kinds=("token reduction", "backbone"),
    methods={"sparsifiner": "sparsifiner"},
    goldens=("sparsifiner_deit_small", "sparsifiner_deit_tiny", "op_sparsifiner_mask_predictor"),
    tests=("tests/papers/test_sparsifiner.py",),
)


class MaskPredictor(nn.Module):
    """q, k (B, h, N, d) -> the map that they are about to make, thin: (B, h, N - P, N), rows of grid tokens."""

    undecayed = ("squeeze", "spread")

    def __init__(
        self, grid: tuple[int, ...], prefix: int, width: int, reduce_tokens: int = 6, reduce_channels: int = 2,
        basis: int = 8,
    ) -> None:
        super().__init__()
        count = prefix + torch.Size(grid).numel()
        self.grid, self.prefix, self.basis = grid, prefix, basis
        self.squeeze = nn.Parameter(torch.randn(count, count // reduce_tokens) * count**-0.5)
        self.spread = nn.Parameter(torch.randn(count, count // reduce_tokens) * count**-0.5)
        self.q = nn.Linear(width, width // reduce_channels)
        self.k = nn.Linear(width, width // reduce_channels)

    def coefficients(self, q: Tensor, k: Tensor, grid: tuple[int, ...]) -> Tensor:
        """How much each grid token looks at each summary: (B, h, N - P, M), the strongest of a row."""
        summaries = self._at(self.squeeze, grid).mT @ self.k(k)
        looks = ((self.q(q[:, :, self.prefix:]) * q.shape[1] ** -0.5) @ summaries.mT).softmax(-1)
        if self.basis >= looks.shape[-1]:
            return looks
        strongest = looks.topk(self.basis, -1)
        return torch.zeros_like(looks).scatter(-1, strongest.indices, strongest.values)

    def written(self, coefficients: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The map (B, h, N - P, N) of coefficients."""
        spread = self._at(self.spread, grid).abs()
        return coefficients @ torch.where(spread <= 0.02, 0, spread).mT

    def forward(self, q: Tensor, k: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.written(self.coefficients(q, k, grid), grid)

    def _at(self, matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
        rows = matrix[None, self.prefix:].unflatten(1, self.grid)
        return torch.cat([matrix[:self.prefix], resample(rows, grid).flatten(0, -2)])


class SparseBlock(HostBlock):
    """A block whose grid tokens attend to the share `keep` of the tokens, those that its predictor names."""

    def __init__(self, predictor: MaskPredictor, keep: float, **host: Any) -> None:
        super().__init__(**host)
        self.predictor, self.keep = predictor, keep
        self.watched = nn.Identity()  # hooks see the mask here

    def forward(self, tokens: Tensor, count: int = 0, grid: tuple[int, ...] = ()) -> Tensor:
        self.start(tokens)
        q, k, v = self.queries_keys_values(tokens)
        columns = self.columns(q, k, grid or self.predictor.grid)
        dense = torch.zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        dense[:, :, :self.prefix] = True
        dense[:, :, self.prefix:].scatter_(-1, columns, True)
        mask = self.watched(dense)
        if recording() or torch.is_grad_enabled():
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            mixed = affinity(q, k, bias, where=self.kept.where) @ v  # as the authors, whose near ties fall so
        else:
            rows = at_columns(q[:, :, self.prefix:], k, v, columns)
            mixed = torch.cat([attend(q[:, :, :self.prefix], k, v), rows], 2)
        return self.add_mlp(self.add_mixed(tokens, mixed))

    def columns(self, q: Tensor, k: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, h, N - P, K) the tokens that each grid token attends to."""
        if q.shape[2] != self.prefix + torch.Size(grid).numel():
            raise SaccadeError(f"sparsifiner: {q.shape[2]} tokens came, and its tables belong to a grid of {grid} and "
                               f"{self.prefix} prefix tokens; this host does not tell its grid, so give its own size")
        return self.predictor(q, k, grid).topk(ceil(self.keep * k.shape[2]), -1, sorted=False).indices


def at_columns(q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> Tensor:
    """Attention of each query to keys of its own: q (B, h, N, d), k, v (B, h, M, d), columns (B, h, N, K)."""
    first = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(q.shape[0], -1, 1, 1) * k.shape[2]
    sparse = q.device.type == "cpu" and torch.backends.mkl.is_available() and not torch.compiler.is_compiling()
    return (sparse_rows if sparse else gathered_rows)(q, k, v, columns + first)


def gathered_rows(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """With a copy of its keys and values for each query; `places` count through the keys of all images and heads."""
    keys, values = (part.reshape(-1, part.shape[-1])[places.flatten(0, 1)] for part in (k, v))
    return attend(q.flatten(0, 1)[:, :, None], keys, values).view(q.shape)


def sparse_rows(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """The same with one sparse matrix of all queries and keys: no key or value is copied."""
    kept, place = places.shape[-1], places.flatten()
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (part.reshape(-1, part.shape[-1]).to(wide) for part in (q, k, v))
    ends = torch.arange(0, len(place) + 1, kept)

    def matrix(entries: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(ends, place, entries, (len(queries), len(keys)), check_invariants=False)

    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        scores = torch.sparse.sampled_addmm(matrix(values.new_zeros(len(place))), queries, keys.mT, beta=0.0,
                                            alpha=q.shape[-1] ** -0.5).values()
        mixed = matrix(scores.view(-1, kept).softmax(-1).flatten()) @ values
    return mixed.view(q.shape).to(q.dtype)


def sparsifiner(
    model: nn.Module, keep: float = 0.25, reduce_tokens: int = 6, reduce_channels: int = 2, basis: int = 8
) -> Handle:
    """Put a predictor into every block, to be trained; each row of attention keeps the share `keep` of its entries."""
    check_rate("sparsifiner", "keep", keep)

    def build(number: int, prefix: int, block: Any, **host: Any) -> nn.Module:
        width = block.norm1.weight.shape[0] // heads_of(block)
        predictor = MaskPredictor(native_grid(model), prefix, width, reduce_tokens, reduce_channels, basis)
        return SparseBlock(predictor, keep, block=block, prefix=prefix, **host)

    return open_blocks(model, "sparsifiner", build, needs_class_token=True)


SIZES: dict[str, dict[str, Any]] = {
    f"sparsifiner_deit_{size}": dict(shape, builder="sparsifiner_deit") for size, shape in DEIT_SIZES.items()
}


def sparsifiner_deit(
    dim: int, depth: int, heads: int, keep: float = 0.25, patch: int = 16, mixer: Any = None, **common: Any
) -> Plain:
    """A DeiT of a size with its predictors."""
    model = Plain(dim, depth, heads, patch=patch, replace=mixer, **common)
    sparsifiner(model, keep)
    return model


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """The rate that a golden was recorded with."""
    return dict(keep=golden["source"]["args"]["attn_keep_rate_list"][0])


AUTHORS: KeyMap = (
    *((r"blocks\.(\d+)\.attn\.mask_predictor\." + theirs, rf"blocks.\1.predictor.{ours}")
      for theirs, ours in ((r"proj_n", "squeeze"), (r"proj_back_n", "spread"), (r"proj_c_([qk])\.(.*)", r"\2.\3"))),
    *DEIT,
)
TAPS = {r"mask(\d+)": r"blocks.\1.watched", r"approx(\d+)": r"blocks.\1.predictor", "features": "norm"}
