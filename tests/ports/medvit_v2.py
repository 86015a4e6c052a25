"""MedViTV2's networks, its two blocks and its Kolmogorov-Arnold layers."""

from __future__ import annotations

from torch import nn

from saccade import Site
from saccade.core.build import create_model
from saccade.core.keymap import rename
from saccade.golden import make_inputs
from saccade.papers.medvit_v2 import (
    GLOBAL,
    KAN,
    LOCAL,
    SIZES,
    SPLINES,
    TAPS,
    GlobalBlock,
    LocalBlock,
    RunPooledAttention,
    ScrambledNeighborhood,
    names,
)
from saccade.parts.kan import KanLayer, SplineKanLayer
from saccade.parts.squeeze import divisible
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    head_dim = args.get("head_dim", 32)
    match what:
        case "FasterKAN":
            widths = args["layers_hidden"]
            options = {ours: args[theirs] for ours, theirs in (
                ("low", "grid_min"), ("high", "grid_max"), ("knots", "num_grids"), ("width", "denominator"))
                if theirs in args}
            layers = [KanLayer(*pair, **options) for pair in zip(widths, widths[1:])]
            return Port(nn.Sequential(*layers), key_map(KAN))
        case "KAN" | "KANLinear":
            options = {ours: args[theirs] for ours, theirs in (("cells", "grid_size"), ("degree", "spline_order"))
                       if theirs in args}
            options |= dict(zip(("low", "high"), args.get("grid_range", ())))
            options["scaled"] = args.get("enable_standalone_scale_spline", True)
            widths = args["layers_hidden"] if what == "KAN" else (args["in_features"], args["out_features"])
            layers = [SplineKanLayer(*pair, **options) for pair in zip(widths, widths[1:])]
            network = nn.Sequential(*layers) if what == "KAN" else layers[0]
            grids = dict(network.named_buffers())  # which no golden holds
            return Port(network, lambda state: rename(state, SPLINES).state | grids)
        case "LFP":
            site = Site(args["out_channels"], args["out_channels"] // head_dim, grid=tuple(x.shape[2:]))
            block = LocalBlock(site, ScrambledNeighborhood(site), before=args["in_channels"],
                               stride=args.get("stride", 1), kernel=args.get("kernel_size", 3),
                               ratio=args.get("mlp_ratio", 3))
            return Port(block, key_map(LOCAL), channels_last, channels_first)
        case "GFP":
            dim, share = args["out_channels"], args.get("mix_block_ratio", 0.75)
            width = divisible(int(dim * share), 32)
            site = Site(width, width // head_dim, grid=tuple(x.shape[2:]))
            block = GlobalBlock(site, RunPooledAttention(site, args.get("sr_ratio", 1)), dim=dim,
                                before=args["in_channels"], stride=args.get("stride", 1), head_dim=head_dim,
                                ratio=args.get("mlp_ratio", 2), share=share)
            return Port(block, key_map(GLOBAL), channels_last, channels_first)
    size = dict(SIZES[what.lower().replace("medvit_", "medvit_v2_")]) if what != "MedViT" else dict(
        dims=args.get("dims", (64, 128, 320, 512)), depths=args.get("depths", (2, 2, 6, 2)))
    depths = size["depths"]
    size |= dict(stem=args.get("stem_chs", (64, 32, 64)), reductions=args.get("sr_ratios", (8, 4, 2, 1)),
                 share=args.get("mix_block_ratio", 0.75), head_dim=head_dim, periods=(0, depths[1], 3, 1))
    model = create_model("medvit_v2_tiny", **size, img_size=tuple(x.shape[2:]), in_chans=x.shape[1],
                         num_classes=args.get("num_classes", 1000))
    return Port(model, key_map(names(depths, size["periods"])),
                taps={name: TAPS[name] for name in golden["outputs"] if name in TAPS})
