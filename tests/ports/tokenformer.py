"""TokenFormer's token-parameter attention, its self-attention, and a layer of the language model."""

from __future__ import annotations

from typing import Any

from torch import nn

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.tokenformer import AUTHORS, NORM, Pattention, TokenformerAttention
from saccade.parts.block import Block
from tests.ports.port import Port, State, key_map


def batch_first(inputs: State) -> tuple[Any, ...]:
    """The authors' (N, B, C) as our (B, N, C)."""
    return tuple(value.transpose(0, 1) for value in inputs.values())


def tokens_first(result: Any) -> State:
    return {"out": result.transpose(0, 1)}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    form = args.get("norm_activation_type", "l2_norm_gelu")
    if golden["source"]["object"] == "Pattention":
        return Port(Pattention(args["input_channels"], args["output_channels"], args["param_token_num"], form),
                    key_map(AUTHORS))
    x = next(iter(make_inputs(golden).values()))
    site = Site(args["hidden_size"], args["num_attention_heads"], grid=(x.shape[0],))
    rotary = args.get("rotary_pct", 1.0) if args.get("pos_emb") == "rotary" else 0.0
    pairs = (args["qkv_slot_num"], args["proj_slot_num"])
    module: nn.Module = TokenformerAttention(site, pairs, form=form, causal=True,
                                             rotary=rotary, base=args.get("rotary_emb_base", 10000))
    if golden["source"]["object"] != "ParallelSelfAttention":
        module = Block(site, module, norm=NORM, mlp=lambda dim: Pattention(dim, dim, args["ffn_slot_num"], form))
    return Port(module, key_map(AUTHORS), batch_first, tokens_first)
