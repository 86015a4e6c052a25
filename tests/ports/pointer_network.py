"""The pointing attention, and the network that sorts, hulls and tours."""

from __future__ import annotations

from saccade import Site
from saccade.papers.pointer_network import ATTENTION, AUTHORS, PointerAttention, PointerNetwork, Pointing
from tests.ports.port import Port, State, key_map


class AsCounted(PointerNetwork):
    """What the golden counted: the counter saw no LSTM of the encoder, and their code multiplies W1 e at each step."""

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        dim, hidden = self.embedding.out_features, self.decoder.hidden_size
        step = 8 * hidden**2 + (grid[0] + 1) * hidden**2 + grid[0] * hidden
        return grid[0] * (site.dim * dim + step)


def scores(result: Pointing) -> State:
    """Closed places are -inf here and clamped in the golden."""
    return {"log_scores": result.log_scores.clamp(min=-30), "argmax": result.chosen}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "Attention":
        return Port(PointerAttention(args["hidden_size"]), key_map(ATTENTION))
    module = AsCounted(args["input_dim"], args["embedding_dim"], args["hidden_size"],
                       bidirectional=args.get("bidirectional", True))
    return Port(module, key_map(AUTHORS), outputs=scores)
