"""DependencyViT's network and its reversed attention."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.dependency_vit import AUTHORS, MIXER, ReversedAttention, dependency_vit
from tests.ports.port import Port, State, key_map


def build(golden: dict) -> Port:
    args, inputs = golden["source"]["args"], make_inputs(golden)
    x = inputs["x"]
    if golden["source"]["object"] == "ReversedAttention":
        site = Site(args["dim"], args.get("num_heads", 8), grid=tuple(x.shape[1:-1]))
        mixer = ReversedAttention(site, args.get("qkv_bias", False))

        def arguments(given: State) -> tuple:
            """Messages start at one; an incoming m is the sigmoid of `m0`."""
            before = given["m0"].sigmoid().flatten(1).unsqueeze(-1) if "m0" in given else given["x"].new_ones(1, 1, 1)
            return given["x"], before

        def outputs(result: tuple) -> State:
            return {"out": result[0], "m": result[1].transpose(1, 2).unsqueeze(1)}

        return Port(mixer, key_map(MIXER), arguments, outputs)
    model = dependency_vit(
        args.get("embed_dim", 768), args.get("depth", 12), args.get("num_heads", 12), args.get("patch_size", 16),
        args.get("cpe_depth", 1), args.get("prune_layers") or (), args.get("prune_ratio") or 0,
        img_size=tuple(x.shape[2:]), in_chans=x.shape[1], num_classes=args.get("num_classes", 1000),
    )
    blocks = {f"block{number}": f"blocks.{number}" for number in range(len(model.blocks))}
    return Port(model, key_map(AUTHORS), taps={name: blocks[name] for name in golden["outputs"] if name in blocks})
