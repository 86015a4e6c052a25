"""UniRepLKNet's networks, its block and its dilated kernels, trained and deployed."""

from __future__ import annotations

from functools import partial

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.unireplknet import (
    AUTHORS,
    BLOCK,
    DilatedReparam,
    LargeKernelBlock,
    ResponseMlp,
    SmallKernel,
    unireplknet,
)
from saccade.parts.dilated import DILATED
from saccade.parts.norm import BatchNorm
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what in ("DilatedReparamBlock", "UniRepLKNetBlock"):
        site = Site(args.get("channels", args.get("dim")), grid=tuple(image.shape[2:]))
        kernel = args["kernel_size"]
        mixer = DilatedReparam(site, kernel) if kernel >= 7 or "Dilated" in what else SmallKernel(site, kernel)
        if what == "DilatedReparamBlock":
            return Port(mixer, key_map(DILATED), channels_last, channels_first)
        block = LargeKernelBlock(site, mixer, norm=BatchNorm, mlp=partial(ResponseMlp, ratio=args.get("ffn_factor", 4)))
        return Port(block, key_map(BLOCK), channels_last, channels_first)
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if what == "UniRepLKNet":
        model = unireplknet(args["dims"], args["kernel_sizes"], **common)
    else:
        model = create_model(what, **common)
    taps = {name: name.replace("stage", "stages.") for name in golden["outputs"] if name.startswith("stage")}
    return Port(model, key_map(AUTHORS), taps=taps)
