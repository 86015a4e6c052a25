"""ConViT's modules: the whole network, a block, gated positional and plain self-attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.convit import AUTHORS, SIZES, GatedPositional, convit
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.mlp import Mlp
from saccade.tools.verify import taps
from tests.ports.port import Port, State, as_grid, as_tokens, key_map

ATTENTION = (
    (r"qk\.(.*)", r"qkv.\1#0"),
    (r"v\.(.*)", r"qkv.\1#1"),
    (r"pos_proj\.(.*)", r"position.\1"),
    ("gating_param", "gate"),
)
BLOCK = (
    *((rf"attn\.{theirs}", f"mixer.{ours}") for theirs, ours in ATTENTION),
    (r"attn\.(.*)", r"mixer.\1"),
)


def renamed(rules, heads: int, dim: int, scale: float | None):
    """A key map; where the authors' code was given another scale of q k^T, it goes into q."""
    def rename(state: State) -> State:
        ours = key_map(rules)(state)
        if scale is None:
            return ours
        factor = torch.ones(3 * dim)
        factor[:dim] = scale * (dim // heads) ** 0.5
        return {name: (value * factor.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
                       if "qkv." in name else value) for name, value in ours.items()}
    return rename


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    scale, bias = args.get("qk_scale"), args.get("qkv_bias", False)
    if what in ("GPSA", "MHSA", "Block"):
        heads = args.get("num_heads", 8)
        site = Site(args["dim"], heads, grid=(round(x.shape[1]**0.5),) * 2)
        gated = what == "GPSA" or (what == "Block" and args.get("use_gpsa", True))
        if not gated:
            site = Site(args["dim"], heads, grid=(x.shape[1],))
        mixer = GatedPositional(site, qkv_bias=bias) if gated else Attention(site, bias)
        rules = ATTENTION
        if what == "Block":
            norm = partial(nn.LayerNorm, eps=args.get("eps", 1e-5))
            mixer = Block(site, mixer, norm=norm, mlp=partial(Mlp, ratio=args.get("mlp_ratio", 4.0)))
            rules = BLOCK
        return Port(mixer, renamed(rules, heads, site.dim, scale), as_grid(site.grid), as_tokens)
    factory = SIZES.get(what.lower(), {})  # the factories multiply the width of a head by their number of heads
    heads = args.get("num_heads", factory.get("heads", 12))
    dim = args.get("embed_dim", 48) * (heads if factory else 1)
    model = convit(
        dim, args.get("depth", 12), heads, args.get("local_up_to_layer", 10), args.get("patch_size", 16),
        args.get("mlp_ratio", 4.0), bias, img_size=tuple(x.shape[2:]), in_chans=x.shape[1],
        num_classes=args.get("num_classes", 1000), norm=LAYER_NORM if factory else nn.LayerNorm,
    )
    if not args.get("use_pos_embed", True):
        zero = torch.zeros_like(model.position)
        del model.position
        model.register_buffer("position", zero, persistent=False)
    return Port(model, renamed(AUTHORS, heads, dim, scale), taps=taps("convit_tiny", golden))
