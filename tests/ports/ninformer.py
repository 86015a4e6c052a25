"""NiNformer's network and its gating unit."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.ninformer import AUTHORS, MIXER, MixerGating, ninformer
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, x = golden["source"]["args"], next(iter(make_inputs(golden).values()))
    if golden["source"]["object"] == "MixerGatingUnit":
        dim = args["dim"]
        ratios = [(args[hidden] + 0.5) / dim for hidden in ("token_dim", "channel_dim")]  # half: safe from rounding
        return Port(MixerGating(Site(dim, grid=tuple(x.shape[1:-1])), *ratios), key_map(MIXER))
    dim = args.get("d_model", 256)
    model = ninformer(
        dim, args.get("num_layers", 4), args.get("patch_size", 4), (args.get("d_ffn", 512) + 0.5) / dim,
        img_size=tuple(x.shape[2:]), in_chans=x.shape[1], num_classes=args.get("num_classes", 10),
    )
    taps = {f"block{number}": f"blocks.{number}" for number in range(len(model.blocks))}
    return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
