"""URPE's attention and the encoder of its synthetic tasks."""

from __future__ import annotations

from typing import Any

from saccade import Site
from saccade.papers.urpe import AUTHORS, MIXER, UniversalEncoder, UniversalRelative
from tests.ports.port import Port, key_map


def buckets(args: dict[str, Any], prefix: str) -> int | None:
    """None where the authors' table has an entry an offset."""
    return None if args.get({"": "rel_pos_unique", "ur_": "ur_attn_unique"}[prefix], False) else args.get(
        f"{prefix}rp_bucket", 64)


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "TransformerSentenceEncoder":
        encoder = UniversalEncoder(
            args["vocab_size"], args["embedding_dim"], args["num_encoder_layers"], args["num_attention_heads"],
            args["ffn_embedding_dim"], args["max_seq_len"], args["padding_idx"],
            buckets=(buckets(args, ""), buckets(args, "ur_")), farthest=args.get("max_rp", 128))
        return Port(encoder, key_map(AUTHORS))
    site = Site(args["embed_dim"], args["num_heads"], grid=(args["max_seq_len"],))
    return Port(UniversalRelative(site, buckets=buckets(args, ""), farthest=args.get("max_rp", 128)), key_map(MIXER))
