"""AFFNet's networks, block and filter."""

from __future__ import annotations

from torch import nn

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.affnet import AUTHORS, BLOCK, TAPS, AdaptiveFrequencyFilter, FrequencyBlock
from tests.ports.port import Port, channels_first, channels_last, key_map

MODES = {"xx_small": "affnet_et", "x_small": "affnet_t", "small": "affnet"}
ACTIVATIONS = {"swish": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    activation = ACTIVATIONS[args.get("activation", "swish")]
    if what in ("AFNO2D_channelfirst", "Block"):
        site = Site(args["hidden_size"], grid=tuple(image.shape[2:]))
        mixer = AdaptiveFrequencyFilter(site, args.get("num_blocks", 8), args.get("sparsity_threshold", 0.01),
                                        activation)
        if what == "AFNO2D_channelfirst":
            return Port(mixer, key_map(()), channels_last, channels_first)
        block = FrequencyBlock(site, mixer, ratio=args.get("mlp_ratio", 4.0))
        return Port(block, key_map(BLOCK), channels_last, channels_first)
    model = create_model(MODES[args["mode"]], img_size=tuple(image.shape[2:]), in_chans=image.shape[1],
                         num_classes=args.get("n_classes", 1000), activation=activation)
    taps = {name: TAPS[name] for name in golden["outputs"] if name in TAPS}
    return Port(model, key_map(AUTHORS), taps=taps)
