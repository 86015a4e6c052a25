"""SHViT's networks, trained and fused, and its attention."""

from __future__ import annotations

from torch import nn

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.shvit import AUTHORS, MIXER, TAPS, SingleHeadAttention, shvit
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what == "SHSA":
        site = Site(args["dim"], grid=tuple(image.shape[2:]))
        mixer = SingleHeadAttention(site, args["pdim"], args["qk_dim"])
        return Port(mixer, key_map(MIXER), channels_last, channels_first)
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if what == "SHViT":
        parts = [part if kind == "s" else None for part, kind in zip(args["partial_dim"], args["types"])]
        model: nn.Module = shvit(args["embed_dim"], args["depth"], parts, **common)
    else:
        model = create_model(what, **common)
    taps = {name: TAPS[name] for name in golden["outputs"] if name in TAPS}
    return Port(model, key_map(AUTHORS), taps=taps)
