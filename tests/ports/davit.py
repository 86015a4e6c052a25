"""DaViT's modules: the whole network, its two blocks, channel attention, window attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.davit import SIZES, ChannelGroup, DualBlock, Window, authors_names, davit
from saccade.parts.mlp import Mlp
from tests.ports.port import Port, as_grid, as_tokens, key_map

BLOCK = (
    (r"cpe\.0\.proj\.(.*)", r"position1.\1"),
    (r"cpe\.1\.proj\.(.*)", r"position2.\1"),
    (r"attn\.(.*)", r"mixer.\1"),
)
ORDER = ("spatial", "channel")


class Nothing(nn.Module):
    """The channel mixer of a network without any."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def without_mlp(model: nn.Module) -> None:
    for block in [module for module in model.modules() if isinstance(module, DualBlock)]:
        block.norm2, block.mlp = nn.Identity(), Nothing()


def grid_of(golden: dict, tokens: int) -> tuple[int, ...]:
    """The grid of a block's tokens: its second input, said in the note, or a square."""
    args = golden["source"]["args"]
    for name in ("size", "input_resolution"):
        if name in args:
            return tuple(args[name])
    numbers = "".join(letter if letter.isdigit() else " " for letter in golden.get("note") or "").split()
    for first, second in zip(numbers, numbers[1:]):
        if int(first) * int(second) == tokens:
            return int(first), int(second)
    return (round(tokens**0.5),) * 2


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what in ("ChannelAttention", "WindowAttention"):
        bias = args.get("qkv_bias", what == "WindowAttention")
        if what == "ChannelAttention":
            site = Site(args["dim"], args.get("num_heads", 8), grid=(x.shape[1],))
            return Port(ChannelGroup(site, bias), key_map(()))
        window = tuple(args["window_size"]) if isinstance(args["window_size"], list) else (args["window_size"],) * 2
        site = Site(args["dim"], args["num_heads"], grid=window)
        return Port(Window(site, window, bias), key_map(()), as_grid(window), as_tokens)
    if what in ("ChannelBlock", "SpatialBlock"):
        site = Site(args["dim"], args["num_heads"], grid=grid_of(golden, x.shape[1]))
        bias = args.get("qkv_bias", what == "SpatialBlock")
        mixer = ChannelGroup(site, bias) if what == "ChannelBlock" else Window(site, args.get("window_size", 7), bias)
        block = DualBlock(site, mixer, norm=nn.LayerNorm, mlp=partial(Mlp, ratio=args.get("mlp_ratio", 4.0)))
        if not args.get("ffn", True):
            without_mlp(block)
        first = next(iter(golden["inputs"]))
        return Port(block, key_map(BLOCK), lambda inputs: as_grid(site.grid)({first: inputs[first]}), as_tokens)
    order = tuple(args.get("attention_types", ORDER))
    said = dict(dims=args.get("embed_dims"), depths=args.get("depths"), heads=args.get("num_heads"),
                window=args.get("window_size"), patch=args.get("patch_size"), mlp_ratio=args.get("mlp_ratio"),
                qkv_bias=args.get("qkv_bias"), overlapped=args.get("overlapped_patch"),
                num_classes=args.get("num_classes"))
    defaults = SIZES.get(what.lower(), dict(dims=(64, 128, 192, 256), depths=(1, 1, 3, 1), heads=(3, 6, 12, 24)))
    settings = defaults | {name: value for name, value in said.items() if value is not None}
    model = davit(**settings | dict(order=order, img_size=tuple(x.shape[2:]), in_chans=x.shape[1]))
    if not args.get("ffn", True):
        without_mlp(model)
    taps = {f"stage{number + 1}": f"stages.{number}" for number in range(len(settings["depths"]))}
    found = {name: taps[name] for name in golden["outputs"] if name in taps}
    return Port(model, key_map(authors_names(len(order))), taps=found)
