"""CrossViT's modules: the whole network, a multi-scale block, the attention of a class token to all."""

from __future__ import annotations

from functools import partial

from torch import nn

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.crossvit import AUTHORS, CROSS_ATTENTION, MULTI_SCALE, SIZES, Crossing, CrossViT, MultiScale
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM
from saccade.parts.class_attention import ClassAttention
from saccade.parts.mlp import Mlp
from saccade.parts.plain import TokenBlock
from tests.ports.port import Port, State, key_map


def rescaled(rules, dim: int, heads: int, scale: float | None):
    """A key map; where the authors' code was given another scale of q k^T, it goes into q."""
    def rename(state: State) -> State:
        ours = key_map(rules)(state)
        factor = 1.0 if scale is None else scale * (dim // heads) ** 0.5
        return {name: value * factor if name.startswith("q.") else value for name, value in ours.items()}
    return rename


def norm_of(args: dict):
    """The norm that `norm_layer` says in words."""
    words = str(args.get("norm_layer", "")).split("eps")
    return partial(nn.LayerNorm, eps=float(words[-1].strip(" =)"))) if len(words) > 1 else nn.LayerNorm


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    inputs = make_inputs(golden)
    bias = args.get("qkv_bias", False)
    if what == "CrossAttention":
        dim, heads = args["dim"], args.get("num_heads", 8)
        return Port(ClassAttention(dim, heads, bias), rescaled(CROSS_ATTENTION, dim, heads, args.get("qk_scale")))
    if what == "MultiScaleBlock":
        norm, dims, heads = norm_of(args), args["dim"], args["num_heads"]
        grids = [(x.shape[1] - 1,) for x in inputs.values()]
        branches, crossings = [], []
        for i, (dim, grid) in enumerate(zip(dims, grids)):
            site, following = Site(dim, heads[i], grid=grid), (i + 1) % len(dims)
            branches.append([TokenBlock(site, Attention(site, bias), norm=norm,
                                        mlp=partial(Mlp, ratio=args["mlp_ratio"][i])) for _ in range(args["depth"][i])])
            crossings.append(Crossing(dim, dims[following], heads[following], bias, norm=norm))
        module = MultiScale(branches, crossings)
        module.prefix_count = 1
        return Port(module, key_map(MULTI_SCALE), inputs=lambda given: (tuple(given.values()), grids),
                    outputs=lambda result: dict(zip(golden["outputs"], result)))
    image = next(iter(inputs.values()))
    size = SIZES.get(what.lower().removesuffix("_224"), {})
    dim, heads, depth, ratio = (size.get(key) for key in ("dim", "heads", "depth", "mlp_ratio"))
    native = args.get("img_size", size.get("sides", (240, 224) if size else (224, 224)))
    sides = (native, native) if isinstance(native, int) else tuple(native)
    depths = args.get("depth", [[1, depth, 0]] * 3 if size else [[1, 3, 1]] * 3)
    model = CrossViT(
        args.get("embed_dim", (dim, 2 * dim) if size else (192, 384)), [one[:-1] for one in depths],
        args.get("num_heads", (heads, heads) if size else (6, 12)),
        mlp_ratios=args.get("mlp_ratio", (ratio or 4.0,) * 2 if size else (2.0, 2.0, 4.0)),
        patches=args.get("patch_size", (12, 16) if size else (8, 16)), sides=sides,
        convolutions=args.get("multi_conv", size.get("convolutions", False)),
        qkv_bias=args.get("qkv_bias", bool(size)), norm=LAYER_NORM if size else norm_of(args),
        fixed=True, img_size=sides[-1], in_chans=image.shape[1], num_classes=args.get("num_classes", 1000),
    )
    return Port(model, key_map(AUTHORS),
                taps={name: f"stages.{name.removeprefix('block')}" for name in golden["outputs"] if "block" in name})
