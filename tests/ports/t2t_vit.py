"""T2T-ViT's modules: the whole network, whatever its trunk, the tokens-to-token stem, its two token transformers."""

from __future__ import annotations

import torch

from saccade import Site, create_model
from saccade.core.load import key_maps
from saccade.golden import make_inputs
from saccade.papers.t2t_vit import (
    AUTHORS,
    SIZES,
    STEM,
    TOKEN_TRANSFORMER,
    TokenAttention,
    TokenPerformer,
    TokensToToken,
    TokenTransformer,
    t2t_vit,
)
from saccade.papers.t2t_vit_trunks import SIZES as TRUNKS
from saccade.tools.verify import taps
from tests.ports.port import Port, State, as_grid, as_tokens, key_map


def rescaled(rules, factor: float, what: str):
    """A key map; where the authors' code was given another scale of q k^T, the factor goes into q."""
    def rename(state: State) -> State:
        ours = key_map(rules)(state)
        if factor == 1:
            return ours
        for name, value in ours.items():
            if f"{what}.qkv." in name:
                q, kv = value[: value.shape[0] // 3], value[value.shape[0] // 3:]
                ours[name] = torch.cat([q * factor, kv])
        return ours
    return rename


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    match what:
        case "Token_performer" | "Token_transformer":
            site = Site(args["dim"], grid=(x.shape[1],))
            if what == "Token_performer":
                width = args["in_dim"] * args.get("head_cnt", 1)
                attention, factor = TokenPerformer(site, width, args.get("kernel_ratio", 0.5)), 1.0
            else:
                attention = TokenAttention(site, args["in_dim"], args.get("qkv_bias", False))
                factor = (args.get("qk_scale") or site.dim**-0.5) * site.dim**0.5
            module = TokenTransformer(site, attention, args.get("mlp_ratio", 1.0))
            return Port(module, rescaled(TOKEN_TRANSFORMER, factor, "attention"), as_grid(site.grid), as_tokens)
        case "T2T_module":
            module = TokensToToken(2, args.get("in_chans", 3), args.get("embed_dim", 768),
                                   width=args.get("token_dim", 64), tokens=args.get("tokens_type", "performer"))
            return Port(module, key_map(STEM), outputs=as_tokens)
    options = dict(img_size=tuple(x.shape[2:]), in_chans=x.shape[1], num_classes=args.get("num_classes", 1000))
    if what.lower() in TRUNKS:
        name = what.lower()
        return Port(create_model(name, **options), key_map(key_maps(name)["authors"]), taps=taps(name, golden))
    theirs = {"dim": "embed_dim", "depth": "depth", "heads": "num_heads", "qkv_bias": "qkv_bias",
              "mlp_ratio": "mlp_ratio", "tokens": "tokens_type", "width": "token_dim"}
    shape = {ours: args[name] for ours, name in theirs.items() if name in args}
    default = dict(dim=768, depth=12, heads=12, mlp_ratio=4.0)
    shape = SIZES.get(what.lower(), default) | shape | options
    model = t2t_vit(**shape)
    head = (shape["dim"] // shape["heads"]) ** 0.5
    inner = {"t2t": "stem", "block_last": f"blocks.{shape['depth'] - 1}"}
    return Port(model, rescaled(AUTHORS, (args.get("qk_scale") or 1 / head) * head, "mixer"),
                taps={name: inner[name] for name in golden["outputs"] if name in inner})
