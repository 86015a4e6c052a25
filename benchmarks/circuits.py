"""Which heads feed which: CD-T beside path patching.

    python -m benchmarks.circuits [HOST]

Both say, for every head, what it gives to the scores and to the heads of the last layer, for a picture against 0. Path
patching (Wang et al., "Interpretability in the Wild", 2022) answers with forwards: with a head put out and all others
held as they were, what enters the receivers is read; then they get it in an otherwise untouched forward. Its forwards
begin at the head's layer and go together by layer, as CD-T's do. One process, alternating, medians of ratios.
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
            if number == start and out:
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

    def to_scores(self) -> Tensor:
        """How the scores change by each head's direct path, (heads, classes)."""
        return torch.cat([self.host.scores - self._to_scores(layer) for layer in range(len(self.host.layers))])

    def _to_scores(self, layer: int) -> Tensor:
        nodes = [Node(layer, head) for head in range(self.host.layers[layer].heads)]
        tokens = self.host.states[layer].expand(len(nodes), -1, -1)
        held = {number: found["heads"].expand(len(nodes), -1, -1, -1)
                for number, found in enumerate(self.host.activations)}
        return self.run(tokens, layer, False, held, nodes)

    def to_last(self) -> Tensor:
        """How the scores change by each head's path through each head of the last layer, (senders, receivers)."""
        last, found = len(self.host.layers) - 1, []
        receivers = range(self.host.layers[last].heads)
        for layer in range(last):
            nodes = [Node(layer, head) for head in range(self.host.layers[layer].heads)]
            tokens = self.host.states[layer].expand(len(nodes), -1, -1)
            seen = self.run(tokens, layer, True, {}, nodes)  # (senders, T, heads, e)
            before = self.host.activations[last]["heads"]
            patched = before.expand(len(nodes) * len(receivers), -1, -1, -1).clone()
            for sender in range(len(nodes)):
                for receiver in receivers:
                    patched[sender * len(receivers) + receiver, :, receiver] = seen[sender, :, receiver]
            scores = self.run(self.host.states[last].expand(len(patched), -1, -1), last, False, {last: patched})
            found.append((self.host.scores - scores).abs().mean(1).unflatten(0, (len(nodes), len(receivers))))
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
    with torch.inference_mode():
        host = Transformer(create_model(options.host), torch.randn(1, 3, options.size, options.size), split=True)
        patching, nodes, last = PathPatching(host), host.nodes(), len(host.layers) - 1
        targets = [node for node in nodes if node.layer == last]
        senders = [node for node in nodes if node.layer < last]
        plain = Transformer.__new__(Transformer)
        plain.__dict__ = {**host.__dict__, "split": False}
        ways = {"heads to the scores": {
            "path patching": patching.to_scores, "CD-T": partial(effects, host, nodes),
            "CD-T, weights whole": partial(effects, plain, nodes)}, "heads to the last layer's heads": {
            "path patching": patching.to_last, "CD-T": partial(effects, host, senders, targets),
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
        "Both start at the cached tokens of a head's layer and take its heads together. Speed is the median of the "
        "rounds' ratios; agreement is the rank correlation with path patching of how much each head gives.", "",
        "| question | method | seconds | times as fast | agreement |", "|---|---|--:|--:|--:|", *lines]))


if __name__ == "__main__":
    sys.exit(main())
