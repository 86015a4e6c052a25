"""SReT's networks and its attention in groups."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.sret import AUTHORS, SlicedGroup, sret
from saccade.tools.verify import taps
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what == "Group_Attention":
        again = "recursive_index=True" in golden["note"]  # an argument of the authors' forward
        site = Site(args["dim"], args.get("num_heads", 8), grid=(x.shape[1],))
        groups = args.get("num_groups2", 4) if again else args.get("num_groups1", 8)
        return Port(SlicedGroup(site, groups, again, args.get("qkv_bias", False)), key_map(()))
    common = dict(img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=x.shape[1])
    if what == "SReT":
        loops = args["depth"][0] // args["recursive_num"][0]
        model = sret(args["base_dims"][0], args["mlp_ratio"], args["depth"], args["heads"], args["np_mlp_ratio"],
                     args["groups1"], args["groups2"], loops, **common)
    else:
        model = create_model(what.lower(), **common)
    return Port(model, key_map(AUTHORS), taps=taps("sret_t", golden))
