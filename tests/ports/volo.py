"""VOLO's networks and outlook attention."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.volo import AUTHORS, OUTLOOK, Outlook, volo
from saccade.tools.verify import taps
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what == "OutlookAttention":
        site = Site(args["dim"], args["num_heads"], grid=tuple(x.shape[1:-1]))
        mixer = Outlook(site, args.get("kernel_size", 3), args.get("stride", 1), args.get("qkv_bias", False))
        return Port(mixer, key_map(OUTLOOK))
    common = dict(img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=x.shape[1])
    if what == "VOLO":
        model = volo(args["embed_dims"], args["layers"], args["num_heads"], args["mlp_ratios"][0],
                     args.get("out_kernel", 3), args.get("out_stride", 2), args.get("stem_hidden_dim", 64),
                     args.get("patch_size", 8), len(args["post_layers"]), **common)
    else:
        model = create_model(what, **common)
    return Port(model, key_map(AUTHORS), taps=taps("volo_d1", golden))
