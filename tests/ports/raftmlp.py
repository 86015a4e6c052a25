"""RaftMLP's network and one of its levels."""

from __future__ import annotations

from saccade import Site
from saccade.core.keymap import within
from saccade.golden import make_inputs
from saccade.papers.raftmlp import (
    AUTHORS,
    MultiScaleEmbed,
    RaftBlock,
    RaftMixing,
    block_names,
    embed_names,
    raftmlp,
)
from saccade.parts.pyramid import Stage
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    image = next(iter(make_inputs(golden).values()))
    if golden["source"]["object"] == "SerialPermutedLevel":
        side = args["pretrained_image_size"] // args["patch_size"]
        sites = [Site(args["out_channels"], index=index, grid=(side, side)) for index in range(args["depth"])]
        blocks = [RaftBlock(site, RaftMixing(site, args["raft_size"], args["token_expansion_factor"]),
                            ratio=args["channel_expansion_factor"]) for site in sites]
        embed = MultiScaleEmbed(args["in_channels"], args["out_channels"], args["embedding_kernels"])
        embedding = within(embed_names(args["embedding_kernels"]), "", "downsample.")
        names = key_map((*embedding, *block_names(args["raft_size"])))
        return Port(Stage(embed, blocks), names, channels_last, channels_first)
    layers = args["layers"]
    model = raftmlp([layer["dim"] for layer in layers], [layer["depth"] for layer in layers],
                    [layer["embedding_kernels"] for layer in layers], layers[0]["raft_size"],
                    args["token_expansion_factor"], args["channel_expansion_factor"],
                    img_size=args["pretrained_image_size"], num_classes=args.get("num_classes", 1000),
                    in_chans=image.shape[1])
    taps = {name: name.replace("level", "stages.") for name in golden["outputs"] if name.startswith("level")}
    return Port(model, key_map(AUTHORS), taps=taps)
