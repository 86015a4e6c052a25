"""NAT, DiNAT, DiNAT_s and the 2-D neighborhood attention module."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.nat import AUTHORS, Neighborhood, NormedPatches, dinat_s, isotropic, nat
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what.startswith("NeighborhoodAttention"):
        site = Site(args["dim"], args["num_heads"], grid=tuple(image.shape[1:-1]))
        mixer = Neighborhood(site, args["kernel_size"], args.get("dilation", 1) or 1, args.get("qkv_bias", True),
                             args.get("bias", True))
        return Port(mixer, key_map(((r"rpb", "bias"),)))
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000),
                  in_chans=args.get("in_chans", 3))
    if what == "NATIsotropic":
        layer = {"kernel": args.get("kernel_size", 7), "dilation": args.get("dilation", 2) or 1}
        model = isotropic(args["embed_dim"], args["num_heads"], args["depth"], patch=args["patch_size"],
                          **layer, **common)
        return Port(model, key_map(AUTHORS("nat_isotropic_small")))
    if what in ("NAT", "DiNAT", "DiNAT_s"):
        common |= dict(dim=args["embed_dim"], depths=args["depths"], heads=args["num_heads"][0],
                       mlp_ratio=args.get("mlp_ratio", 4.0), dilations=args.get("dilations"),
                       kernel=args.get("kernel_size", 7))
        model = dinat_s(**common) if what == "DiNAT_s" else nat(layer_scale=args.get("layer_scale"), **common)
    else:
        model = create_model(what, **common)
        if isinstance(model, NormedPatches):
            return Port(model, key_map(AUTHORS(what)))
    last = len(model.stages)
    taps = {f"stage{number}": f"stages.{number}.downsample" for number in range(1, last)} | {
        f"stage{last}": f"stages.{last - 1}"}
    return Port(model, key_map(AUTHORS("nat_mini")),
                taps={name: taps[name] for name in golden["outputs"] if name in taps})
