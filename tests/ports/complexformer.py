"""Complex multi-head attention, of all tokens and causal."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.complexformer import AUTHORS, ComplexAttention
from tests.ports.port import Port, key_map


class AsCounted(ComplexAttention):
    """What the golden counted: the scores as products of the sizes r alone, the cosines of all pairs as no product."""

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        return ComplexAttention.cost(site, grid) - grid[0] ** 2 * site.dim // 2


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    x = next(iter(make_inputs(golden).values()))
    # The mask is an input of the authors' module, of which the note alone tells.
    causal = args.get("causal", "causal" in golden["note"].lower())
    return Port(AsCounted(Site(args["d_model"], args["num_heads"], grid=tuple(x.shape[1:-1])), causal=causal),
                key_map(AUTHORS))
