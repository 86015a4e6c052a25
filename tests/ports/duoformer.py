"""DuoFormer's network and its block of scale attention."""

from __future__ import annotations

import re

from saccade.core.keymap import rename
from saccade.golden import make_inputs
from saccade.papers.duoformer import AUTHORS, SCALE_BLOCK, ScaleBlock, duoformer
from tests.ports.port import Port, State, key_map

BACKBONES = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r50_Swav": "resnet50"}


def shifted_names(skipped: int):
    """Projections are counted from the finest map that is used, or from the finest there is: both are ours from 0."""
    def renamed(state: State) -> State:
        ours = rename(state, AUTHORS).state
        numbers = sorted({int(name.split(".")[1]) for name in ours if name.startswith("project.")})
        return {re.sub(r"^project\.(\d+)", lambda match: f"project.{numbers.index(int(match[1]))}", name): value
                for name, value in ours.items()}
    return renamed if skipped else key_map(AUTHORS)


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what == "ScaleBlock":
        return Port(ScaleBlock(args["dim"], args["num_heads"], args.get("mlp_ratio", 4.0), args.get("qkv_bias", False),
                               args.get("init_values")), key_map(SCALE_BLOCK))
    image = next(iter(make_inputs(golden).values()))
    depth, scales = args.get("depth", 12), args.get("num_layers", 4)
    model = duoformer(BACKBONES[args.get("backbone", "r50")], args.get("embed_dim", 768), depth,
                      args.get("num_heads", 12), scales, args.get("mlp_ratio", 4.0),
                      img_size=tuple(image.shape[2:]), in_chans=image.shape[1],
                      num_classes=args.get("num_classes", 1000))
    taps = {"scale_last": f"scales.{depth - 1}", "patch_last": f"blocks.{depth - 1}"}
    for name in golden["outputs"]:
        if match := re.fullmatch(r"(scale|patch)(\d+)", name):
            taps[name] = f"{'scales' if match[1] == 'scale' else 'blocks'}.{match[2]}"
    return Port(model, shifted_names(4 - scales), taps={name: taps[name] for name in golden["outputs"] if name in taps})
