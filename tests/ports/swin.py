"""Swin's modules: the whole network, a block, patch merging, window attention."""

from __future__ import annotations

from torch import nn

from saccade import Site
from saccade.core.keymap import Dropped
from saccade.papers.swin import AUTHORS, ShiftedWindow, swin
from saccade.parts.block import Block
from saccade.parts.merging import PatchMerging
from saccade.parts.window import WindowAttention
from tests.ports.port import Port, as_grid, as_tokens, key_map

ATTENTION = (
    Dropped(r".*(relative_position_index|attn_mask)", "derived buffer"),
    (r"(?:attn\.)?relative_position_bias_table", "bias.table"),
    (r"attn\.(.*)", r"\1"),
)
BLOCK = (
    ATTENTION[0],
    (r"attn\.relative_position_bias_table", "mixer.bias.table"),
    (r"attn\.(.*)", r"mixer.\1"),
)


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    match golden["source"]["object"]:
        case "SwinTransformer":
            dims = tuple(args["embed_dim"] * 2**stage for stage in range(len(args["depths"])))
            model = swin(dims, tuple(args["depths"]), tuple(args["num_heads"]), args["window_size"],
                         args.get("patch_size", 4), img_size=args.get("img_size", 224),
                         num_classes=args.get("num_classes", 1000), in_chans=args.get("in_chans", 3))
            stages = len(args["depths"])
            taps = {f"stage{number}": f"stages.{number}.downsample" for number in range(1, stages)}
            taps[f"stage{stages}"] = f"stages.{stages - 1}"
            return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
        case "SwinTransformerBlock":
            site = Site(args["dim"], args["num_heads"], grid=tuple(args["input_resolution"]))
            mixer = ShiftedWindow(site, args.get("window_size", 7), args.get("shift_size", 0))
            return Port(Block(site, mixer, norm=nn.LayerNorm), key_map(BLOCK), as_grid(site.grid), as_tokens)
        case "PatchMerging":
            return Port(PatchMerging(2, args["dim"], 2 * args["dim"]), key_map(()), as_grid(args["input_resolution"]),
                        as_tokens)
        case "WindowAttention":
            site = Site(args["dim"], args["num_heads"], grid=tuple(args["window_size"]))
            attention = WindowAttention(site, tuple(args["window_size"]))
            return Port(attention, key_map(ATTENTION), as_grid(site.grid), as_tokens)
    raise NotImplementedError(golden["source"]["object"])
