"""Adventurer."""

from __future__ import annotations

from saccade import create_model
from saccade.golden import make_inputs
from saccade.papers.patch_scaling import AUTHORS
from saccade.tools.verify import taps
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, name = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    model = create_model(name, img_size=tuple(image.shape[2:]), in_chans=image.shape[1],
                         num_classes=args.get("num_classes", 1000))
    return Port(model, key_map(AUTHORS), taps=taps(name, golden))
