"""GLMix's networks and blocks."""

from __future__ import annotations

from functools import partial

from torch import nn

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.glmix import AUTHORS, BLOCK, GLMix, SeededBlock
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM
from saccade.parts.convolution import depthwise
from saccade.parts.mlp import EarlyLocalMlp, Mlp
from saccade.parts.norm import BatchNorm
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what not in ("GLMixBlock", "MHSA_NCHW_Block"):
        model = create_model(what, img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000),
                             in_chans=image.shape[1])
        taps = {f"stage{stage}": f"stages.{stage}" for stage in range(4)}
        return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
    site = Site(args["embed_dim"], args["num_heads"], grid=tuple(image.shape[2:]))
    kernel, scale = args.get("cpe_ks", 0), args.get("layerscale", -1)
    mlp = partial(EarlyLocalMlp, 2) if args.get("mlp_dw") else Mlp
    mixer: nn.Module = Attention(site)
    if what == "GLMixBlock":
        mixer = GLMix(site, args.get("num_slots", 64), args.get("local_dw_ks", 5), args.get("slot_init") == "param")
    norm = BatchNorm if args.get("norm_layer") == "BatchNorm2d" else LAYER_NORM  # LayerNorm2d is over the channels
    block = SeededBlock(site, mixer, norm=norm, mlp=partial(mlp, ratio=args.get("mlp_ratio", 4.0)),
                        layer_scale=scale if scale > 0 else None,
                        position=depthwise(2, site.dim, kernel) if kernel else None)
    if what == "MHSA_NCHW_Block":
        block.norm1 = LAYER_NORM(site.dim)
    return Port(block, key_map(BLOCK), channels_last, channels_first)
