"""What every token mixer is: one template, out_i = sum_j P_ij v_j, and how each mixer fills its three places."""

from __future__ import annotations

from typing import NamedTuple


class Template(NamedTuple):
    """Where the numbers P_ij come from, what makes weights of them, and what is summed with them (or how).

    q, k, v are linear in the tokens x; w is learned. Declared by a mixer's class as `template`; `docs/mixers.md` has
    the table of all, with what can be measured beside it: cost, dependence on content, reach.
    """

    affinity: str
    normalization: str
    aggregation: str
