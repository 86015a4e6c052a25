"""AttNet's networks, block, gated MLP and attentive convolution."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.atconv import AUTHORS, BLOCK, MIXER, MLP, AttentiveConvolution, GatedMlp, atconv
from saccade.parts.block import Block
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    size = tuple(next(iter(make_inputs(golden).values())).shape[2:])
    names = {name for name, *_ in golden["state"]}
    match what:
        case "ATConv":
            site = Site(args["dim"], grid=size)
            mixer = AttentiveConvolution(site, args.get("kernel_size", 3), args.get("bias", True))
            return Port(mixer, key_map(MIXER), channels_last, channels_first)
        case "GLU":
            mlp = GatedMlp(2, args["in_features"], args["hidden_features"], "norm_layer.weight" in names)
            return Port(mlp, key_map(MLP), channels_last, channels_first)
        case "Block":
            dim = args["dim"]
            site, hidden = Site(dim, grid=size), int(2 * int(dim * args.get("exp_rate", 4.0)) / 3)
            scale = 1e-6 if "layer_scale_1.gamma" in names else None
            block = Block(site, AttentiveConvolution(site, args["kernel_size"], args.get("conv_bias", True)),
                          layer_scale=scale,
                          mlp=lambda dim: GatedMlp(2, dim, hidden, "channel_mixer.norm_layer.weight" in names))
            return Port(block, key_map(BLOCK), channels_last, channels_first)
        case "AttNet":
            model = atconv(args["dims"], args["depths"], args.get("exp_rates", (4, 4, 4, 4)),
                           args.get("kernel_sizes", (5, 5, 5, 5)), any(args.get("glu_norm", (True,))),
                           1e-6 if args.get("use_layer_scale", True) else None, img_size=size,
                           num_classes=args.get("num_classes", 1000))
        case factory:
            model = create_model(factory.lower(), img_size=size, num_classes=args.get("num_classes", 1000))
    taps = {name: name.replace("stage", "stages.") for name in golden["outputs"] if name != "out"}
    return Port(model, key_map(AUTHORS), taps=taps)
