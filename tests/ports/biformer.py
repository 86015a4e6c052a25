"""BiFormer's networks, blocks and mixers, with every setting that the authors' classes have."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade import Site
from saccade.core.keymap import KeyMap, matrix_from_1x1
from saccade.golden import make_inputs
from saccade.papers.biformer import (
    AUTHORS,
    BLOCK,
    MIXER,
    SIZES,
    TAPS,
    BiLevelRouting,
    EnhancedAttention,
    LatePaddedRouting,
    SoftRouting,
    biformer,
    biformer_stl,
    inside,
)
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.convolution import depthwise
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from tests.ports.port import Port, channels_first, channels_last, key_map

Args = dict[str, Any]
# What the paper's models never have, but the authors' blocks can.
EXTRA: KeyMap = (
    (r"gamma(?P<which>\d)", r"scale\g<which>.0.gamma"),
    (r"mlp\.1\.dwconv\.(?P<rest>.*)", r"mlp.activation.0.\g<rest>"),
    *((rf"attn\.{at}\.weight", f"mixer.{at - 1}.weight", matrix_from_1x1) for at in (1, 3)),
    (r"attn\.2\.weight", "mixer.1.weight"),
    *((rf"attn\.{at}\.bias", f"mixer.{at - 1}.bias") for at in (1, 2, 3)),
)
OF_BLOCK = (*EXTRA, *BLOCK)
OF_LAYER = inside(r"blocks\.(?P<block>\d+)\.", r"\g<block>.", OF_BLOCK)
OF_MODEL = (
    *inside(r"stages\.(?P<stage>\d+)\.(blocks\.)?(?P<block>\d+)\.", r"stages.\g<stage>.blocks.\g<block>.", EXTRA),
    *AUTHORS,
)


class Zero(nn.Module):
    """A local term that is absent."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class PostNormBlock(Block):
    """x = norm(x + branch(x)): the authors' `pre_norm=False`."""

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        if self.position is not None:
            x = x + self.position(x)
        x = self.norm1(x + self.scale1(self.mixer(x, **optional)))
        return self.norm2(x + self.scale2(self.mlp(x)))


def without_absent(module: Any, kernel: int) -> Any:
    if not kernel:
        module.local = Zero()
    return module


def pooling(args: Args) -> nn.Module | None:
    mode, ratio, count = args["kv_downsample_mode"], args.get("kv_downsample_ratio", 4), args.get("kv_per_win", 4)
    if mode == "identity" or (ratio == 1 and not mode.startswith("ada")):
        return None
    layers = {"ada_avgpool": nn.AdaptiveAvgPool2d, "ada_maxpool": nn.AdaptiveMaxPool2d,
              "avgpool": nn.AvgPool2d, "maxpool": nn.MaxPool2d}
    return layers[mode](count if mode.startswith("ada") else ratio)


def routing(args: Args, site: Site) -> BiLevelRouting:
    """BiLevelRoutingAttention."""
    args = dict(side_dwconv=3, kv_downsample_mode="identity") | args
    options = dict(regions=args.get("n_win", 7), topk=args.get("topk", 4), kernel=args["side_dwconv"] or 1,
                   qk_dim=args.get("qk_dim"), scale=args.get("qk_scale"), pool=pooling(args))
    if args.get("soft_routing"):
        learns = args.get("diff_routing", False), args.get("param_routing", False)
        module: BiLevelRouting = SoftRouting(site, *learns, **options)
    else:
        module = BiLevelRouting(site, **options)
    if args.get("param_attention", "qkvo") == "qkv":
        module.proj = nn.Identity()
    return without_absent(module, args["side_dwconv"])


def late_routing(args: Args, site: Site) -> LatePaddedRouting:
    """nchwBRA."""
    kernel = args.get("side_dwconv", 3)
    module = LatePaddedRouting(site, args.get("n_win", 7), args.get("topk", 4), kernel or 1, scale=args.get("qk_scale"))
    return without_absent(module, kernel)


def with_lepe(args: Args, site: Site, of_values: bool) -> EnhancedAttention:
    """AttentionLePE and nchwAttentionLePE."""
    kernel = args.get("side_dwconv", 5)
    module = EnhancedAttention(site, kernel or 1, args.get("num_heads", 8), of_values)
    if args.get("qkv_bias"):
        module.qkv = nn.Linear(site.dim, 3 * site.dim)
    return without_absent(module, kernel)


def attention(args: Args, site: Site) -> Attention:
    """Attention."""
    return Attention(replace(site, heads=args.get("num_heads", 8)), args.get("qkv_bias", False))


def mixer_of(args: Args, site: Site, late: bool = False) -> nn.Module:
    """What a block's `topk` says."""
    topk = args.get("topk", 4)
    only = {"side_dwconv": args["side_dwconv"]}
    if topk > 0:
        return late_routing(args, site) if late else routing(args, site)
    if topk == 0:
        return nn.Sequential(nn.Linear(site.dim, site.dim), depthwise(2, site.dim, 5), nn.Linear(site.dim, site.dim))
    if late:
        return with_lepe({}, site, of_values=True)
    return attention({}, site) if topk == -1 else with_lepe(only, site, of_values=False)


def block(args: Args, site: Site) -> Block:
    """Block."""
    args = dict(side_dwconv=5, kv_downsample_mode="ada_avgpool", mlp_ratio=4, layer_scale_init_value=-1) | args
    hidden = int(args["mlp_ratio"] * site.dim)

    def activation() -> nn.Module:
        return nn.Sequential(depthwise(2, hidden, 3), Gelu()) if args.get("mlp_dwconv") else Gelu()

    scale = args["layer_scale_init_value"]
    return (Block if args.get("pre_norm", True) else PostNormBlock)(
        site, mixer_of(args, site), mlp=partial(Mlp, ratio=args["mlp_ratio"], activation=activation),
        position=depthwise(2, site.dim, 3) if args.get("before_attn_dwconv", 3) else None,
        layer_scale=scale if scale > 0 else None,
    )


def stl_block(args: Args, site: Site, late: bool) -> Block:
    """BiFormerBlock of either layout."""
    args = dict(side_dwconv=5) | args
    return Block(site, mixer_of(args, site, late), mlp=partial(Mlp, ratio=args.get("mlp_ratio", 4)))


def network(args: Args, common: Args) -> Pyramid:
    """BiFormer."""
    args = dict(depth=[3, 4, 8, 3], embed_dim=[64, 128, 320, 512], head_dim=64, topks=[8, 8, -1, -1],
                kv_per_wins=[2, 2, -1, -1], kv_downsample_ratios=[4, 2, 1, 1], mlp_ratios=[4] * 4) | args
    model = biformer(args["embed_dim"], args["depth"], **common)
    for stage, qk_dim in enumerate(args["qk_dims"]):
        own = args | dict(topk=args["topks"][stage], qk_dim=qk_dim, kv_per_win=args["kv_per_wins"][stage],
                          kv_downsample_ratio=args["kv_downsample_ratios"][stage], mlp_ratio=args["mlp_ratios"][stage])
        blocks = model.stages[stage].blocks
        for place, old in enumerate(blocks):
            blocks[place] = block(own, replace(old.site, heads=qk_dim // args["head_dim"]))
    return model


def stl_network(args: Args, common: Args, late: bool) -> Pyramid:
    """BiFormerSTL and nchwBiFormerSTL; norms come as the name of their class."""
    args = dict(depth=[2, 2, 6, 2], embed_dim=[96, 192, 384, 768], head_dim=32, topks=[1, 4, 16, -2], n_wins=[7] * 4,
                mlp_ratios=[4] * 4, side_dwconv=5, norm_layer="LayerNorm2d") | args
    args["pre_head_norm_layer"] = args.get("pre_head_norm_layer") or args["norm_layer"]
    model = biformer_stl(args["embed_dim"], args["depth"], late_padding=late, **common)
    for stage, dim in enumerate(args["embed_dim"]):
        own = dict(topk=args["topks"][stage], n_win=args["n_wins"][stage], mlp_ratio=args["mlp_ratios"][stage],
                   side_dwconv=args["side_dwconv"])
        blocks = model.stages[stage].blocks
        for place, old in enumerate(blocks):
            blocks[place] = stl_block(own, replace(old.site, heads=dim // args["head_dim"]), late)
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNorm):
            chosen = args["pre_head_norm_layer"] if name == "norm" else args["norm_layer"]
            if "BatchNorm" not in str(chosen):
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, LAYER_NORM(module.num_features))
    return model


def layer(args: Args, site: Site, late: bool) -> nn.Sequential:
    """BasicLayer."""
    return nn.Sequential(*(stl_block(args, site, late) for _ in range(args["depth"])))


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    late = golden["source"]["file"].endswith("nchw.py")
    site = Site(args.get("dim", 64), args.get("num_heads", 8))
    first = channels_last, channels_first
    match what:
        case "BiLevelRoutingAttention":
            return Port(routing(args, site), key_map(MIXER))
        case "nchwBRA":
            return Port(late_routing(args, site), key_map(MIXER), *first)
        case "AttentionLePE":
            return Port(with_lepe(args, site, of_values=False), key_map(MIXER))
        case "nchwAttentionLePE":
            return Port(with_lepe(args, site, of_values=True), key_map(MIXER), *first)
        case "Attention":
            return Port(attention(args, site), key_map(MIXER))
        case "Block":
            return Port(block(args, site), key_map(OF_BLOCK), *first)
        case "BiFormerBlock":
            return Port(stl_block(args, site, late), key_map(OF_BLOCK), *(first if late else ()))
        case "BasicLayer":
            return Port(layer(args, site, late), key_map(OF_LAYER), *first)
    common = dict(img_size=tuple(next(iter(make_inputs(golden).values())).shape[2:]),
                  num_classes=args.get("num_classes", 1000), in_chans=args.get("in_chans", 3))
    if what in ("biformer_tiny", "biformer_small", "biformer_base"):
        size = SIZES[what]
        factory = dict(depth=size["depths"], embed_dim=size["dims"], qk_dims=size["dims"], mlp_ratios=[3] * 4,
                       head_dim=32, topks=[1, 4, 16, -2], kv_downsample_mode="identity")
        model = network(factory | args, common)
    elif what in ("biformer_stl", "biformer_stl_nchw"):
        factory = dict(norm_layer="BatchNorm2d", topks=[1, 4, 16, -1] if late else [1, 4, 16, -2])
        model = stl_network(factory | args, common, late)
    elif what == "BiFormer":
        model = network(args, common)
    elif what in ("BiFormerSTL", "nchwBiFormerSTL"):
        model = stl_network(args, common, late)
    else:
        raise NotImplementedError(what)
    return Port(model, key_map(OF_MODEL), taps={name: TAPS[name] for name in golden["outputs"] if name in TAPS})
