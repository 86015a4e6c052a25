"""Which heads feed which: CD-T beside path patching.

    python -m benchmarks.circuits [HOST]

Both say, for every head, what it gives to the scores and to the heads of the last layer, for a picture against 0. Path
patching (Wang et al., "Interpretability in the Wild", 2022) answers with forwards: with a head put out and all others
held as they were, what enters the receivers is read; then they get it in an otherwise untouched forward. As published,
a head at a time, from the first layer on; here also from the head's layer, a layer's heads together, as CD-T's go. Its
paths are direct ones, CD-T's all. One process, alternating, medians of ratios.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import write_section
from saccade import create_model
from saccade.ops.attend import attend
from saccade.papers.cd_t import Node, Transformer, effects
from saccade.tools.measure import race


class PathPatching:
    """Forwards of a Plain from a layer's cached tokens on, heads put in by hand; one copy of the picture a head."""

    def __init__(self, host: Transformer) -> None:
        self.host = host

    def run(self, tokens: Tensor, start: int, held: bool, given: dict[int, Tensor], out: Sequence[Node] = ()) -> Tensor:
        """Scores (K, classes) of tokens (K, T, C), or what heads `held` as they were would have given, last (K, T, C).

        `given` replaces what a layer's heads give; `out` are put out, one a copy.
        """
        last = len(self.host.layers) - 1
        for number, layer in enumerate(self.host.layers[start:], start):
            x = self._norm(tokens, layer.modules["norm1"])
            context = given.get(number, self.host.activations[number]["heads"].expand(len(tokens), -1, -1, -1))
            if number not in given and (not held or number == last):
                q, k, v = (F.linear(x, *layer.weights(role)).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                           for role in ("q", "k", "v"))
                fresh = attend(q, k, v).transpose(1, 2)
                if held and start < last:
                    return fresh
                context = context if held else fresh
            if out and number == out[0].layer:
                context = context.clone()
                for copy, node in enumerate(out):
                    context[copy, :, node.head] = 0
            tokens = tokens + F.linear(context.flatten(2), *layer.weights("out"))
            hidden = F.linear(self._norm(tokens, layer.modules["norm2"]), *layer.weights("fc1"))
            tokens = tokens + F.linear(layer.modules["activation"](hidden), *layer.weights("fc2"))
        tokens = self._norm(tokens[:, :1], self.host.ends["norm"])[:, 0]
        return F.linear(tokens, self.host.ends["head"].weight, self.host.ends["head"].bias)

    @staticmethod
    def _norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _senders(self, layers: int, together: bool) -> list[tuple[int, list[Node]]]:
        """Layer to begin at and the heads that go together: a layer's from its tokens on, or one from the first on."""
        each = [[Node(layer, head) for head in range(self.host.layers[layer].heads)] for layer in range(layers)]
        return [(nodes[0].layer, nodes) for nodes in each] if together else [(0, [node]) for node in sum(each, [])]

    def to_scores(self, together: bool = True) -> Tensor:
        """How the scores change by each head's direct path, (heads, classes)."""
        found = []
        for start, nodes in self._senders(len(self.host.layers), together):
            tokens = self.host.states[start].expand(len(nodes), -1, -1)
            held = {number: each["heads"].expand(len(nodes), -1, -1, -1)
                    for number, each in enumerate(self.host.activations)}
            found.append(self.host.scores - self.run(tokens, start, False, held, nodes))
        return torch.cat(found)

    def to_last(self, together: bool = True) -> Tensor:
        """How the scores change by each head's path through each head of the last layer, (senders, receivers)."""
        last, found = len(self.host.layers) - 1, []
        receivers = self.host.layers[last].heads
        for start, nodes in self._senders(last, together):
            seen = self.run(self.host.states[start].expand(len(nodes), -1, -1), start, True, {}, nodes)
            patched = self.host.activations[last]["heads"].expand(len(nodes) * receivers, -1, -1, -1).clone()
            for copy in range(len(patched)):
                patched[copy, :, copy % receivers] = seen[copy // receivers, :, copy % receivers]
            begin, groups = (last, [patched]) if together else (0, list(patched.split(1)))
            scores = torch.cat([self.run(self.host.states[begin].expand(len(one), -1, -1), begin, False, {last: one})
                                for one in groups])
            found.append((self.host.scores - scores).abs().mean(1).unflatten(0, (len(nodes), receivers)))
        return torch.cat(found)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = [each.flatten().argsort().argsort().double() for each in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", nargs="?", default="deit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        host = Transformer(create_model(options.host), torch.randn(1, 3, options.size, options.size), split=True)
        patching, nodes, last = PathPatching(host), host.nodes(), len(host.layers) - 1
        targets = [node for node in nodes if node.layer == last]
        senders = [node for node in nodes if node.layer < last]
        plain = Transformer.__new__(Transformer)
        plain.__dict__ = {**host.__dict__, "split": False}
        ways = {"heads to the scores": {
            "path patching": patching.to_scores, "path patching, as published": partial(patching.to_scores, False),
            "CD-T": partial(effects, host, nodes),
            "CD-T, weights whole": partial(effects, plain, nodes)}, "heads to the last layer's heads": {
            "path patching": patching.to_last, "path patching, as published": partial(patching.to_last, False),
            "CD-T": partial(effects, host, senders, targets),
            "CD-T, weights whole": partial(effects, plain, senders, targets)}}
        lines = []
        for question, each in ways.items():
            seconds = race(each, rounds=options.rounds)
            asked = patching.to_scores if "scores" in question else patching.to_last
            wanted = asked().abs().mean(1)
            for name, function in each.items():
                pairs = zip(seconds["path patching"], seconds[name], strict=True)
                ratio = median(theirs / ours for theirs, ours in pairs)
                given = function().abs().flatten(1).mean(1)
                lines.append(f"| {question} | {name} | {median(seconds[name]):.2f} | {ratio:.2f} | "
                             f"{rank_correlation(given, wanted):.2f} |")
    write_section("circuits", "\n".join([
        "## Circuits: CD-T beside path patching", "",
        f"`python -m benchmarks.circuits`: {options.host} (fresh weights, {len(nodes)} heads), a picture of side "
        f"{options.size}, {platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds. "
        "Both start at the cached tokens of a head's layer and take its heads together; path patching as published "
        "goes from the first layer on, a head at a time. Direct paths alone need no attention anew, which is why it is "
        "fast there; CD-T follows all paths. Speed is the median of the rounds' ratios; agreement is the rank "
        "correlation with path patching of how much each head gives.", "",
        "| question | method | seconds | times as fast | agreement |", "|---|---|--:|--:|--:|", *lines]))


if __name__ == "__main__":
    sys.exit(main())
