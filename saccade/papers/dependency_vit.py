"""DependencyViT: tokens send to their parents, and a tree emerges.

Self-attention gathers: each token weighs all others, the weights of a row sum to one. Reversed attention sends: token i
divides its message among its parents j by the same softmax, and what j receives is
    out_j = sum_i softmax_j(q_i k_j / sqrt(d)) p_i m_i v_i,
the transposed weights. p chooses the head a token sends by (a softmax over heads, of temperature 0.1); m in (0, 1), a
product over layers, lets a token fall silent. Leaves hardly send, so the Lite models drop the quietest tokens, and who
sends to whom, summed over layers, is a dependency tree (`dependency_tree`).

Ding, Shen, Fan, Chen, Chen, Luo, Tenenbaum, Gan, "Visual Dependency Transformers: Dependency Tree Emerges from Reversed
Attention", 2023, section 3.

Any grid: nothing is bound to a size. Maps of a Lite model hold a dropped token as it last was.
Quirks kept (of the timm port that the goldens are of; the authors' repository is empty): layer scale of 1e-6, no
position but a depthwise convolution after the first block, the mean of norm(x) m is classified. Where the caller
replaces any mixer, no token is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.sizes import larger
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import depthwise
from saccade.parts.isotropic import Isotropic
from saccade.parts.mlp import Gelu
from saccade.parts.tokens import global_tokens

CARD = Card(
    "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    authors="Ding, Shen, Fan, Chen, Chen, Luo, Tenenbaum, Gan",
    year=2023,
    systems=("dependency_vit",),
    arxiv="2304.03282",
    code="huggingface/pytorch-image-models@f63d2e8 (pull request 2062)",
    licence="Apache-2.0",
    read="paper, code",
    keywords="reversed attention, dependency tree, head selector, message controller, dynamic token pooling, parts",
    kinds=("backbone", "mixer"),
    mixers={"reversed_attention": "ReversedAttention"},
    aliases={f"dependencyvit_{size}_patch16_224": f"dependencyvit_{size}" for size in ("tiny", "small", "lite_tiny")},
    goldens=("dependencyvit_tiny", "op_reversed_attention", "op_reversed_attention_m"),
    tests=("tests/papers/test_dependency_vit.py",),
)

WEIGHTS_AT_ONCE = 2**20  # softmax weights in memory where no gradient is taken


class ReversedAttention(nn.Module):
    """Each token sends p m v to all tokens, divided by its softmax over them: (B, *grid, C) -> (B, *grid, C).

    Given the `messages` (B, *grid, 1) that earlier layers let through, it also returns them times its own m. `places`
    (B, N) are the tokens' numbers for a watcher, where some of the grid are missing.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template(
        "k q^T / sqrt(d): what j sends to i", "softmax over the receivers i", "sum of p m v, by learned importances"
    )

    def __init__(self, site: Site, qkv_bias: bool = False, temperature: float = 0.1) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.temperature = site.heads, temperature
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.selector = nn.Linear(site.dim, site.heads, bias=False)
        self.controller = nn.Sequential(
            nn.Linear(site.dim, site.dim // 2, bias=False), Gelu(), nn.Linear(site.dim // 2, 1, bias=False)
        )
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor, messages: Tensor | None = None, places: Tensor | None = None) -> Any:
        q, k, v = self._heads(x)
        sent = self._sent(x, messages)
        sending = v * self._gates(x, sent)
        if recording():
            weights = sender_weights(q, k)
            note(weights, lambda: (places, places) if places is not None else global_tokens(q.shape[2], x.device))
            out = weights.transpose(-2, -1) @ sending
        else:
            out = send(q, k, sending)
        out = self.proj(out.transpose(1, 2).reshape(x.shape))
        return out if messages is None else (out, sent)

    def dependencies(self, x: Tensor, messages: Tensor | None = None) -> Tensor:
        """The soft dependency mask (B, N, N): how much token i (row) sends to token j, summed over heads."""
        q, k, _ = self._heads(x)
        return (sender_weights(q, k) * self._gates(x, self._sent(x, messages))).sum(1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _sent(self, x: Tensor, messages: Tensor | None) -> Tensor:
        own = self.controller(x).sigmoid()
        return own if messages is None else messages * own

    def _gates(self, x: Tensor, sent: Tensor) -> Tensor:
        """p m of each head and sender: (B, heads, N, 1)."""
        chosen = (self.selector(x) / self.temperature).softmax(-1)
        return (chosen * sent).flatten(1, -2).transpose(1, 2).unsqueeze(-1)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of N tokens: 4 N C^2 (projections), N C h (heads), N (C + 1) C / 2 (messages), 2 N^2 C."""
        tokens, C = prod(grid), site.dim
        return tokens * (4 * C * C + C * site.heads + (C + 1) * (C // 2) + 2 * tokens * C)

    def reach(self, site: Site) -> None:
        """Every token sends to every other."""
        return None


def sender_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax over receivers j of q_i k_j / sqrt(d): (B, h, N, N), the rows of senders sum to one."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


def send(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out_j = sum_i softmax_j(q_i k_j / sqrt(d)) v_i, all (B, h, N, d).

    Fused attention divides by the sum over what it reads, here over senders, so it does not apply. Where no gradient is
    taken, a few senders at a time write to all receivers and no N x N matrix exists.
    """
    fixed = all(isinstance(side, int) for side in q.shape)  # sizes that export leaves open cannot choose
    whole = not fixed or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole or prod(q.shape[:3]) * q.shape[2] <= WEIGHTS_AT_ONCE:
        return sender_weights(q, k).transpose(-2, -1) @ v
    images, senders = q.flatten(0, 1), max(WEIGHTS_AT_ONCE // (q.shape[2] * prod(q.shape[:2])), 16)
    receivers, values = k.flatten(0, 1), v.flatten(0, 1)
    out = torch.zeros_like(values)
    for some, theirs in zip(images.split(senders, 1), values.split(senders, 1), strict=True):
        out.baddbmm_(sender_weights(some, receivers).transpose(1, 2), theirs)
    return out.view_as(v)


class DependencyBlock(Block):
    """x += tail(mixer(norm(x))); the quietest tokens leave; x += tail(mlp(norm(x))); x += position(x).

    x is a map (B, *grid, C) until a share of its tokens is kept, then a sequence (B, N, C); `messages` go along, and
    `places` (B, N), the tokens' numbers in the map, once some are gone.
    """

    def __init__(self, site: Site, mixer: nn.Module, **options: Any) -> None:
        super().__init__(site, mixer, **options)
        self.keep: tuple[int, int] | None = None  # so many tokens of so many

    def forward(  # type: ignore[override]
        self, x: Tensor, messages: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if isinstance(self.mixer, ReversedAttention):
            mixed, messages = self.mixer(self.norm1(x), messages, places)
        else:
            mixed = self.mixer(self.norm1(x))
        x = x + self.scale1(mixed)
        if self.keep is not None:
            x, messages = x.flatten(1, -2), messages.flatten(1, -2)
            kept, of = self.keep
            count = larger(x.shape[1] * kept // of, 1)
            chosen = messages.detach().squeeze(-1).topk(count).indices.sort().values
            places = chosen if places is None else places.gather(1, chosen)
            x, messages = (value.gather(1, chosen.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
                           for value in (x, messages))
        x = x + self.scale2(self.mlp(self.norm2(x)))
        return x if self.position is None else x + self.position(x), messages, places


class DependencyViT(Isotropic):
    """A Plain whose blocks hand on what earlier ones let through.

    After block `prune[i]` (counted from one) a share 1 - (i + 1) `dropped` of all tokens is left.
    """

    def __init__(self, *args: Any, prune: Sequence[int] = (), dropped: float = 0.16, **options: Any) -> None:
        super().__init__(*args, **options)
        share = Fraction(dropped).limit_denominator(1000)
        if share * len(prune) >= 1:
            raise SaccadeError(f"dropped={dropped} of the tokens after each of {len(prune)} blocks leaves none; "
                               "drop fewer or more seldom")
        blocks: Any = self.blocks
        first = 1 + max((number for number, block in enumerate(blocks, 1) if block.position is not None), default=0)
        if any(not first <= number <= len(blocks) for number in prune):
            raise SaccadeError(f"prune={tuple(prune)}: number blocks from {first} (convolutions need a whole map) to "
                               f"{len(blocks)}")
        if all(isinstance(block.mixer, ReversedAttention) for block in blocks):
            for step, number in enumerate(sorted(prune)):
                blocks[number - 1].keep = ((1 - (step + 1) * share) / (1 - step * share)).as_integer_ratio()

    def run(self, image: Tensor, maps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The tokens after the last block, and their messages; the map after each block is added to `maps`."""
        x = self.stem(image)
        grid, whole, places = tuple(x.shape[1:-1]), x.flatten(1, -2), None
        messages = torch.ones_like(x[..., :1])
        for block in self.blocks:
            x, messages, places = block(x, messages, places)
            if maps is not None:
                whole = x.flatten(1, -2) if places is None else whole.scatter(1, places[..., None].expand_as(x), x)
                maps.append(whole.unflatten(1, grid).movedim(-1, 1))
        return x, messages

    def features(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        self.run(image, maps)
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """norm(x) m of the tokens that are left, (B, N, C)."""
        x, messages = self.run(image)
        return (self.norm(x) * messages).flatten(1, -2)


@dataclass(frozen=True)
class DependencyTree:
    """A tree of the tokens of one image: `parents[i]` is the token that i depends on, -1 for the root."""

    parents: Tensor
    grid: tuple[int, ...]

    @cached_property
    def root(self) -> int:
        return int((self.parents < 0).nonzero())

    @cached_property
    def depths(self) -> Tensor:
        """Steps from each token up to the root, as a map of the grid."""
        depths, above = torch.zeros_like(self.parents), self.parents.clone()
        while (above >= 0).any():
            depths += above >= 0
            above = torch.where(above >= 0, self.parents[above.clamp(min=0)], above)
        return depths.view(self.grid)

    def children(self, token: int) -> list[int]:
        return (self.parents == token).nonzero().flatten().tolist()

    def subtree(self, token: int) -> Tensor:
        """Which tokens depend on this one, itself too, as a map of the grid: a part of what is in the image."""
        inside = torch.arange(len(self.parents)) == token
        while True:
            grown = inside | (inside[self.parents.clamp(min=0)] & (self.parents >= 0))
            if bool((grown == inside).all()):
                return inside.view(self.grid)
            inside = grown

    def parts(self) -> Tensor:
        """A map of the grid that numbers the subtrees of the root's children; the root has -1."""
        labels = torch.full(self.grid, -1)
        for number, child in enumerate(self.children(self.root)):
            labels[self.subtree(child)] = number
        return labels


@torch.no_grad()
def dependencies(model: DependencyViT, image: Tensor) -> Tensor:
    """How much each token sends to each other, summed over heads and layers: (B, N, N), senders in rows."""
    total: list[Tensor] = []

    def add(block: DependencyBlock, inputs: tuple[Any, ...]) -> None:
        if not isinstance(block.mixer, ReversedAttention):
            return
        x, messages, places = inputs
        mask = block.mixer.dependencies(block.norm1(x), messages)
        if places is None:
            total.append(mask)
            return
        cells = places[:, :, None] * total[0].shape[-1] + places[:, None]
        total.append(torch.zeros_like(total[0]).flatten(1).scatter(1, cells.flatten(1), mask.flatten(1))
                     .view_as(total[0]))

    handles = [module.register_forward_pre_hook(add) for module in model.modules()
               if isinstance(module, DependencyBlock)]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    if not total:
        raise SaccadeError("no block has reversed attention any more: keep the model's own mixer in one at least")
    return torch.stack(total).sum(0)


def dependency_tree(model: DependencyViT, image: Tensor) -> list[DependencyTree]:
    """The tree of each image: rooted in the token that receives most, of the largest product of sent messages."""
    masks = dependencies(model, image).double().cpu()
    grid = tuple(model.stem(image[:1]).shape[1:-1])
    scores = masks.clamp(min=torch.finfo(torch.float64).tiny).log()
    return [DependencyTree(arborescence(score, int(mask.sum(0).argmax())), grid)
            for score, mask in zip(scores, masks, strict=True)]


def arborescence(score: Tensor, root: int) -> Tensor:
    """The tree of the largest sum of `score[child, parent]`: the parent of each node, -1 for the root.

    (Chu and Liu, 1965; Edmonds, "Optimum Branchings", 1967: greedy parents; each cycle becomes one node, whose
    parent is worth what breaking the cycle there gains.)
    """
    score = score.clone().fill_diagonal_(-torch.inf)
    score[root] = -torch.inf
    parents = score.argmax(1)
    parents[root] = -1
    label = _cycles(parents.tolist())
    names, group = label.unique(return_inverse=True)
    if len(names) == len(parents):
        return parents
    members = [(group == number).nonzero().flatten() for number in range(len(names))]
    inside = torch.tensor([len(nodes) > 1 for nodes in members])[group]
    kept = score.gather(1, parents.clamp(min=0)[:, None])
    gain = torch.where(inside[:, None], score - kept, score)
    best = torch.stack([gain[:, nodes].amax(1) for nodes in members], 1)
    best = torch.stack([best[nodes].amax(0) for nodes in members])
    above = arborescence(best, int(group[root]))
    for number, nodes in enumerate(members):
        if above[number] < 0:
            continue
        others = members[int(above[number])]
        between = gain[nodes][:, others]
        child, parent = divmod(int(between.argmax()), len(others))
        parents[nodes[child]] = others[parent]
    return parents


def _cycles(parents: list[int]) -> Tensor:
    """A number for each node: the smallest of its cycle, its own where it is on none."""
    label, seen = list(range(len(parents))), [-1] * len(parents)
    for start in range(len(parents)):
        path, node = [], start
        while node >= 0 and seen[node] < 0:
            seen[node] = start
            path.append(node)
            node = parents[node]
        if node >= 0 and seen[node] == start:
            cycle = path[path.index(node):]
            for one in cycle:
                label[one] = min(cycle)
    return torch.tensor(label)


_TINY: dict[str, Any] = dict(dim=192, depth=12, heads=12, patch=16)
_SMALL: dict[str, Any] = dict(dim=384, depth=12, heads=12, patch=16)
_LITE: dict[str, Any] = dict(prune=(2, 5, 8, 11))
_NANO: dict[str, Any] = dict(dim=64, depth=4, heads=4, patch=4, img_size=32)
SIZES: dict[str, dict[str, Any]] = {
    "dependencyvit_tiny": _TINY,
    "dependencyvit_small": _SMALL,
    "dependencyvit_lite_tiny": _TINY | _LITE,
    "dependencyvit_lite_small": _SMALL | _LITE,
    "dependencyvit_nano": _NANO,
    "dependencyvit_lite_nano": _NANO | dict(prune=(2, 3)),
}


def dependency_vit(
    dim: int,
    depth: int,
    heads: int,
    patch: int,
    convolved: int = 1,
    prune: Sequence[int] = (),
    dropped: float = 0.16,
    mixer: Any = None,
    **common: Any,
) -> DependencyViT:
    """A DependencyViT; the first `convolved` blocks end in a position convolution, blocks `prune` drop tokens."""

    def block(site: Site, built: nn.Module, **options: Any) -> DependencyBlock:
        position = depthwise(site.rank, dim, 3) if site.index < convolved else None
        return DependencyBlock(site, built, layer_scale=1e-6, position=position, **options)

    return DependencyViT(dim, depth, heads, patch=patch, mixer=ReversedAttention, block=block, replace=mixer,
                         prune=prune, dropped=dropped, **common)


MIXER: KeyMap = (
    (r"head_selector\.(.*)", r"selector.\1"),
    (r"message_controller\.fc1\.(.*)", r"controller.0.\1"),
    (r"message_controller\.fc2\.(.*)", r"controller.2.\1"),
)
AUTHORS: KeyMap = (
    (r"patch_embed\.proj\.(.*)", r"stem.proj.\1"),
    *within((*MIXER, (r"(.*)", r"\1")), r"blocks\.(\d+)\.attn\.", r"blocks.\1.mixer."),
    (r"blocks\.(\d+)\.ls(\d)\.gamma", r"blocks.\1.scale\2.0.gamma"),
    (r"blocks\.(\d+)\.peg\.proj\.(.*)", r"blocks.\1.position.\2"),
)
TAPS = {r"block(\d+)": r"blocks.\1"}
