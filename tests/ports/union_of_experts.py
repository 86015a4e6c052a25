"""The selective attention and the union of MLP experts."""

from __future__ import annotations

from functools import partial

from saccade import Site
from saccade.core.keymap import rename
from saccade.golden import make_inputs, make_state
from saccade.papers.union_of_experts import ATTENTION, MLP, SelectiveAttention, UnionOfMlps, turn_half
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    x = next(iter(make_inputs(golden).values()))
    routing = dict(capacity=args.get("capacity", 1.0), epsilon=args.get("epsilon", 1e-6), batched=True)
    if golden["source"]["object"] == "U_MLP":
        names = MLP
        module = UnionOfMlps(args["transformer_dim"], args["transformer_hidden_dim"], args["n_experts"], args["topk"],
                             **routing)
    else:
        names = ATTENTION
        site = Site(args["transformer_dim"], args["attn_n_experts"], grid=tuple(x.shape[1:-1]))
        module = SelectiveAttention(site, args["attn_topk"], **routing)
        x = turn_half(x, args["attn_n_experts"])
    module.load_state_dict(rename(make_state(golden), names).state)
    places = int(module.router(x)[0].sum(-1).max())  # the authors' arithmetic is that of the tokens routed here
    module.cost = partial(module.cost, places=places)
    return Port(module, key_map(names))
