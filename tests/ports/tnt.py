"""TNT's modules: the whole network, a block on words and sentences."""

from __future__ import annotations

from functools import partial

from torch import nn

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.tnt import AUTHORS, BLOCK, SIZES, NestedBlock, tnt
from saccade.parts.attention import Attention
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    inputs = make_inputs(golden)
    shapes = {name: shape for name, shape, *_ in golden["state"]}
    bias = args.get("qkv_bias", False)
    if what == "Block":
        words, tokens = inputs.values()
        inner = Site(args["inner_dim"], args.get("inner_num_heads", 4), grid=(words.shape[1],))
        site = Site(args["outer_dim"], args.get("outer_num_heads", 4), grid=(tokens.shape[1] - 1,))
        module = NestedBlock(
            site, Attention(site, bias), inner=inner, qkv_bias=bias, norm=nn.LayerNorm,
            inner_ratio=shapes["inner_mlp.fc1.weight"][0] / inner.dim, mlp_ratio=args.get("mlp_ratio", 4.0),
        )
        module.prefix_count = 1
        return Port(
            module, key_map(BLOCK), inputs=lambda given: (given["inner"], given["outer"], 1, site.grid),
            outputs=lambda result: {"inner": result[0], "outer": result[1]},
        )
    image = next(iter(inputs.values()))
    ours = {"dim": "embed_dim", "depth": "depth", "heads": "outer_num_heads", "inner_dim": "inner_dim",
            "inner_heads": "inner_num_heads", "patch": "patch_size", "word_stride": "inner_stride",
            "mlp_ratio": "mlp_ratio", "num_classes": "num_classes"}
    size = next((SIZES[name] for name in SIZES if what.startswith(f"{name}_")), {})
    default = dict(dim=768, depth=12, heads=12, inner_dim=48, inner_heads=4)
    shape = {**default, **size, **{key: args[theirs] for key, theirs in ours.items() if theirs in args}}
    ratio = shapes["blocks.0.inner_mlp.fc1.weight"][0] / shape["inner_dim"]
    model = partial(tnt, **shape)(inner_ratio=ratio, qkv_bias=bias, img_size=tuple(image.shape[2:]),
                                  in_chans=image.shape[1])
    return Port(model, key_map(AUTHORS),
                taps={name: f"blocks.{int(name.removeprefix('words')) - 1}.inner" for name in golden["outputs"]
                      if name.startswith("words")})
