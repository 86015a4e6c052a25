"""CD-T: every activation of a transformer carried as what comes from a source and what does not.

x = rel + irrel, through one forward, whose sum stays the ordinary forward:
    linear      W rel + b |W rel| / (|W rel| + |W irrel|),            the rest
    norm        w (rel - mean rel) / deviation of x, + its share of b, the rest
    activation  f(x) - f(irrel),                                      f(irrel)
    attention   P rel,  P irrel;  or, its weights split too,  P(rel) rel,  P x - P(rel) rel
Where both parts of a number have opposite signs, the larger takes their sum (`merge`). The source is the embeddings of
some tokens (which words, which patches speak for a class), or what some heads or MLPs add to their mean; K sources go
through together. Going back from the scores to the nodes that feed them, and from those on, gives a circuit.

Hsu, Zhou, Cherapanamjeri, Huang, Odisho, Carroll, Yu, "Mechanistic Interpretation through Contextual Decomposition in
Transformers", 2024.

Quirk kept: merging happens after every step of a layer with norms after its sums (BERT), after the MLP's two linear
layers and the block alone of one with norms before. Of a bias, the irrelevant part gets what the relevant one leaves,
so that the sum is exact; the authors' two shares leave 1e-8 of it to none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.ops.attend import affinity
from saccade.parts.opened import Layer, Opened
from saccade.parts.tokens import token_grid

CARD = Card(
    "Mechanistic Interpretation through Contextual Decomposition in Transformers",
    authors="Hsu, Zhou, Cherapanamjeri, Huang, Odisho, Carroll, Yu",
    year=2024,
    systems=("cd_t",),
    arxiv="2407.00886",
    code="adelaidehsu/CD_Circuit@079ecef",
    read="fact sheet",
    keywords="contextual decomposition, relevant and irrelevant parts, circuit discovery, attention heads, BERT, GPT-2",
    kinds=("explain", "attribution"),
    methods={"cd_t": "cd_t"},
    goldens=("op_cdt_bert_encoder", "op_cdt_gpt_layer"),
    tests=("tests/papers/test_cd_t.py",),
)

EPS = 1e-8


class Parts(NamedTuple):
    """K decompositions of the same activations: rel and irrel (K, B, ...), of one `total` (1, B, ...)."""

    rel: Tensor
    irrel: Tensor

    @property
    def total(self) -> Tensor:
        return self.rel[:1] + self.irrel[:1]

    def each(self, function: Callable[[Tensor], Tensor]) -> Parts:
        """What is linear, and adds nothing, is done to each part."""
        return Parts(function(self.rel), function(self.irrel))


def add(x: Parts, y: Parts) -> Parts:
    return Parts(x.rel + y.rel, x.irrel + y.irrel)


def with_bias(x: Parts, bias: Tensor | None, like: Parts) -> Parts:
    """x + bias, which is parted as the sizes of `like` are."""
    if bias is None:
        return x
    rel = bias * like.rel.abs() / (like.rel.abs() + like.irrel.abs() + EPS)
    return Parts(x.rel + rel, x.irrel + (bias - rel))


def linear(x: Parts, weight: Tensor, bias: Tensor | None = None) -> Parts:
    y = x.each(lambda part: F.linear(part, weight))
    return with_bias(y, bias, y)


def norm(x: Parts, layer: Any) -> Parts:
    """A LayerNorm: each part less its own mean, by the deviation of the whole."""
    scale = (x.total.var(-1, unbiased=False, keepdim=True) + layer.eps).rsqrt() * layer.weight
    return with_bias(x.each(lambda part: (part - part.mean(-1, keepdim=True)) * scale), layer.bias, x)


def bend(x: Parts, activation: Callable[[Tensor], Tensor]) -> Parts:
    irrel = activation(x.irrel.clone())  # ours works in place
    return Parts(activation(x.total) - irrel, irrel)


def merge(x: Parts) -> Parts:
    """Where the parts have opposite signs the larger takes their sum, the other is 0.

    Which is to say: each is the sum, held between 0 and itself.
    """
    total = x.rel + x.irrel
    return x.each(lambda part: total.clamp(part.clamp(max=0), part.clamp(min=0)))


class Node(NamedTuple):
    """A head of a layer, or its MLP (`head` None), at one token or at all (`position` None)."""

    layer: int
    head: int | None = None
    position: int | None = None

    @property
    def kind(self) -> str:
        return "mlp" if self.head is None else "heads"

    @property
    def place(self) -> tuple[Any, int]:
        """Where it stands on the axes (T, heads) of what its kind gives."""
        return slice(None) if self.position is None else self.position, self.head or 0


# (layer, "heads" or "mlp", what they give: (K, B, T, heads, e), (K, B, T, 1, C)) -> the same, or changed.
Edit = Callable[[int, str, Parts], Parts]
Means = Sequence[Mapping[str, Tensor]]  # by layer: "heads" (T, heads, e), "mlp" (T, 1, C)


def through(x: Parts, layer: Layer, mask: Tensor | None, split: bool, edit: Callable[[str, Parts], Parts]) -> Parts:
    """Tokens (K, B, T, C) after a layer; `split`: its attention weights are decomposed too."""
    scale1, scale2 = (layer.modules.get(name, nn.Identity()) for name in ("scale1", "scale2"))
    if layer.post:
        x = merge(norm(merge(add(x, _attention(x, layer, mask, split, edit))), layer.modules["norm1"]))
        return merge(norm(merge(add(x, _mlp(x, layer, edit))), layer.modules["norm2"]))
    x = add(x, _attention(norm(x, layer.modules["norm1"]), layer, mask, split, edit).each(scale1))
    return merge(add(x, _mlp(norm(x, layer.modules["norm2"]), layer, edit).each(scale2)))


def _attention(x: Parts, layer: Layer, mask: Tensor | None, split: bool, edit: Callable[[str, Parts], Parts]) -> Parts:
    def heads(part: Tensor) -> Tensor:
        return part.unflatten(-1, (layer.heads, -1)).transpose(-2, -3)

    v = linear(x, *layer.weights("v")).each(heads)
    if split:
        q, k = (linear(x, *layer.weights(role)).each(heads) for role in ("q", "k"))
        rel = affinity(q.rel, k.rel, mask) @ v.rel
        context = Parts(rel, affinity(q.total, k.total, mask) @ v.total - rel)
    else:
        query, key = (heads(F.linear(x.total, *layer.weights(role))) for role in ("q", "k"))
        P = affinity(query, key, mask)
        context = v.each(lambda part: P @ part)
    context = edit("heads", context.each(lambda part: part.transpose(-2, -3))).each(lambda part: part.flatten(-2))
    out = linear(merge(context) if layer.post else context, *layer.weights("out"))
    return merge(out) if layer.post else out


def _mlp(x: Parts, layer: Layer, edit: Callable[[str, Parts], Parts]) -> Parts:
    hidden = bend(merge(linear(x, *layer.weights("fc1"))), layer.modules["activation"])
    out = merge(linear(hidden, *layer.weights("fc2")))
    return edit("mlp", out.each(lambda part: part.unsqueeze(-2))).each(lambda part: part.squeeze(-2))


class Transformer(Opened):
    """A transformer at its inputs: Plain, timm's ViT, transformers' ViT, BERT classifiers and GPT-2.

    `split` decomposes attention weights too, as the authors do for circuits. `states` are the tokens (B, T, C) before
    each layer, `activations` what its nodes give.

    Raises SaccadeError where a model's parts are not found, or do not make the scores that it gives.
    """

    def __init__(self, model: nn.Module, *inputs: Any, split: bool = False, **named: Any) -> None:
        super().__init__(model, *inputs, **named)
        self.split = split
        self.states: list[Tensor] = []
        self.activations: list[dict[str, Tensor]] = [{} for _ in self.layers]  # (B, T, heads, e) and (B, T, 1, C)

        def keep(layer: int, kind: str, x: Parts) -> Parts:
            self.activations[layer][kind] = x.total[0]
            return x

        nothing = torch.zeros_like(self.tokens)[None]
        found = self.run(Parts(nothing, self.tokens[None]), edit=keep, states=self.states).total[0]
        off = (found - self.scores).abs().amax() if found.shape == self.scores.shape else torch.inf
        if not off <= 1e-3 * self.scores.abs().amax():
            raise SaccadeError(f"{type(model).__name__}: its layers, as they are known here, do not make the scores "
                               "that it gives; it has parts of its own")

    @torch.no_grad()
    def run(
        self, x: Parts, start: int = 0, stop: int | None = None, edit: Edit = lambda layer, kind, x: x,
        states: list[Tensor] | None = None,
    ) -> Parts:
        """Tokens (K, B, T, C) that enter layer `start`, as scores (K, B, classes), or as tokens before layer `stop`."""
        for number, layer in enumerate(self.layers[start:stop], start):
            if states is not None:
                states.append(x.total[0])
            x = through(x, layer, self.mask, self.split, partial(edit, number))
        return x if stop is not None else self._scored(x)

    def _scored(self, x: Parts) -> Parts:
        if not self.layers[0].post:
            x = norm(x, self.ends["norm"])
        if not self.layers[0].causal:  # which gives scores of every token
            x = x.each(lambda part: part[..., 0, :] if self.pools_token else part[..., self.prefix:, :].mean(-2))
        if (pooler := self.ends.get("pooler")) is not None:
            x = bend(linear(x, pooler.dense.weight, pooler.dense.bias), pooler.activation)
        if isinstance(pooled := self.ends.get("pooled_norm"), nn.LayerNorm):
            x = norm(x, pooled)
        return linear(x, self.ends["head"].weight, self.ends["head"].bias)

    @property
    def means(self) -> list[dict[str, Tensor]]:
        """What nodes give on average over the batch: the reference that contributions to other inputs are against."""
        return [{kind: value.mean(0) for kind, value in found.items()} for found in self.activations]

    def nodes(self, mlps: bool = False) -> list[Node]:
        """All heads, and all MLPs where asked for, layer by layer."""
        return [Node(number, head) for number, layer in enumerate(self.layers)
                for head in (*range(layer.heads), *((None,) if mlps else ()))]


def importance(host: Transformer, chosen: Tensor) -> Tensor:
    """What sets of tokens `chosen` (K, T), bool, give to the scores: rel (K, B, classes) where they are the source."""
    where = chosen[:, None, :, None]
    return host.run(Parts(torch.where(where, host.tokens, 0), torch.where(where, 0, host.tokens))).rel


def moved(sources: Sequence[Sequence[Node]], means: Means | None = None) -> Edit:
    """In decomposition k, what the nodes of sources[k] give beyond their mean (or 0) becomes relevant."""
    def edit(layer: int, kind: str, x: Parts) -> Parts:
        x = x.each(Tensor.clone)
        for number, nodes in enumerate(sources):
            for node in nodes:
                if (node.layer, node.kind) == (layer, kind):
                    at = (number, slice(None), *node.place)
                    mean = 0 if means is None else means[layer][kind][node.place]
                    x.rel[at] += x.irrel[at] - mean
                    x.irrel[at] = mean
        return x
    return edit


def effects(
    host: Transformer, sources: Sequence[Node], targets: Sequence[Node] = (), means: Means | None = None,
    batch_size: int = 32,
) -> Tensor:
    """What each source gives: to the scores, rel (S, B, classes), or to each target, its share there (S, targets).

    The share is mean |rel| / (mean |rel| + mean |irrel|), over the batch too, 0 where the target stands before. The
    sources of a layer go together, from it to the last target. Raises SaccadeError for a node that is not there.
    """
    for node in (*sources, *targets):
        if not (0 <= node.layer < len(host.layers) and 0 <= (node.head or 0) < host.layers[node.layer].heads):
            raise SaccadeError(f"{node}: there are {len(host.layers)} layers of {host.layers[0].heads} heads")
    found = host.scores.new_zeros(len(sources), *((len(targets),) if targets else host.scores.shape))
    stop = max(node.layer for node in targets) + 1 if targets else None
    for layer in range(len(host.layers) if stop is None else stop):
        numbers = [number for number, node in enumerate(sources) if node.layer == layer]
        for start in range(0, len(numbers), batch_size):
            part = numbers[start:start + batch_size]
            state = host.states[layer].expand(len(part), *host.tokens.shape)
            begin, edit = Parts(torch.zeros_like(state), state), moved([[sources[number]] for number in part], means)
            if targets:
                shares = host.scores.new_zeros(len(part), len(targets))
                host.run(begin, layer, stop, _reading(targets, shares, edit))
                found[part] = shares
            else:
                found[part] = host.run(begin, layer, edit=edit).rel
    return found


def _reading(targets: Sequence[Node], shares: Tensor, before: Edit) -> Edit:
    """`before`, and then the share of what is relevant at each target, put into a column of `shares`."""
    def edit(layer: int, kind: str, x: Parts) -> Parts:
        x = before(layer, kind, x)
        for column, node in enumerate(targets):
            if (node.layer, node.kind) == (layer, kind):
                rel, irrel = (part[(..., *node.place, slice(None))].abs().flatten(1).mean(1) for part in x)
                shares[:, column] = rel / (rel + irrel).clamp(min=EPS)
        return x
    return edit


Metric = Callable[[Tensor], Tensor]  # scores, or their relevant parts, (S, B, classes) -> (S,)


def circuit(
    host: Transformer, metric: Metric, size: int, keep: int = 2, means: Means | None = None, mlps: bool = False
) -> list[Node]:
    """At most `size` nodes: the `keep` that give most to the metric, those that give most to these, and so on back.

    Raises SaccadeError for a size or a `keep` below 1.
    """
    if size < 1 or keep < 1:
        raise SaccadeError(f"size={size}, keep={keep}: give 1 or more of each")
    nodes = host.nodes(mlps)
    given, frontier, found = metric(effects(host, nodes, means=means)), list[Node](), list[Node]()
    while True:
        count = min(keep, size - len(found), len(nodes))
        frontier = [nodes[number] for number in given.topk(count).indices.tolist()]
        found += frontier
        last = max((node.layer, node.kind) for node in frontier)  # heads come before the MLP
        nodes = [node for node in nodes if node not in found and (node.layer, node.kind) < last]
        if len(found) == size or not nodes:
            return found
        given = effects(host, nodes, frontier, means).sum(1)


def faithfulness(
    host: Transformer, nodes: Sequence[Node], metric: Metric, means: Means | None = None, mlps: bool = False
) -> float:
    """The part of the metric that is left where all heads (and MLPs) but `nodes` give their mean, or 0."""
    others = [node for node in host.nodes(mlps) if node not in nodes and node._replace(position=None) not in nodes]
    take = moved([others], means)

    def edit(layer: int, kind: str, x: Parts) -> Parts:
        irrel = take(layer, kind, x).irrel
        return Parts(torch.zeros_like(irrel), irrel)

    start = host.tokens[None]
    return float(metric(host.run(Parts(torch.zeros_like(start), start), edit=edit).total) / metric(host.scores[None]))


@torch.no_grad()
def cd_t(model: nn.Module, image: Tensor, target: Tensor, batch_size: int = 32) -> Tensor:
    """What each patch's tokens, all others being irrelevant, give to the score of `target` (B,): (B, H, W), signed."""
    if batch_size < 1:
        raise SaccadeError(f"batch_size is {batch_size}: give 1 or more")
    host, size = Transformer(model, image), tuple(image.shape[2:])
    count = host.tokens.shape[1]
    if (place := token_grid(count, *size)) is None:
        raise SaccadeError(f"{count} tokens do not lie on a grid over {size[0]} x {size[1]} pixels")
    prefix, grid = place
    sets = torch.eye(count, dtype=torch.bool, device=image.device)[prefix:].split(max(1, batch_size // len(image)))
    given = torch.cat([importance(host, part)[:, range(len(image)), target] for part in sets])  # (N, B)
    return F.interpolate(given.T.unflatten(1, grid)[:, None], size, mode="bilinear", align_corners=False)[:, 0]


cd_t.signed = True  # type: ignore[attr-defined]
