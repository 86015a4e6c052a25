"""EcoFormer's networks and its attention."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.ecoformer import AUTHORS, MIXER, TAPS, KernelizedHashing
from tests.ports.port import Port, as_grid, as_tokens, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    sizes = dict(bits=args.get("nbits", 16), anchors=args.get("m", 25))
    x = next(iter(make_inputs(golden).values()))
    if what == "EcoformerSelfAttention":
        site = Site(args["dim"], args.get("num_heads", 8), grid=(x.shape[1],))
        mixer = KernelizedHashing(site, **sizes, qkv_bias=args.get("qkv_bias", False))
        return Port(mixer, key_map(MIXER), as_grid(site.grid), as_tokens)
    model = create_model(f"ecoformer_{what}", **sizes, img_size=tuple(x.shape[2:]), in_chans=x.shape[1],
                         num_classes=args.get("num_classes", 1000))
    return Port(model, key_map(AUTHORS), taps={tap: TAPS[tap] for tap in golden["outputs"] if tap in TAPS})
