"""VM-UNet and its patch expanding."""

from __future__ import annotations

from saccade.golden import make_inputs
from saccade.papers.vm_unet import AUTHORS, TAPS, PatchExpand, vm_unet
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what == "PatchExpand2D":
        times = args.get("dim_scale", 2)
        return Port(PatchExpand(2, 2 * args["dim"], 2 * args["dim"] // times, times), key_map(()))
    if what == "Final_PatchExpand2D":
        times = args.get("dim_scale", 4)
        return Port(PatchExpand(2, args["dim"], args["dim"] // times, times), key_map(()))
    model = vm_unet((96, 192, 384, 768), args.get("depths", (2, 2, 9, 2)), args.get("depths_decoder", (2, 9, 2, 2)),
                    in_chans=args.get("input_channels", 3), num_classes=args.get("num_classes", 1),
                    img_size=tuple(image.shape[2:]))
    taps = {name: TAPS.get(name, f"decoder.{name[-1]}") for name in golden["outputs"] if name != "out"}
    return Port(model, key_map(AUTHORS), taps=taps)
