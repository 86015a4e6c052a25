"""Agent attention's modules: DeiT, Swin and PVT with agents, and the three forms of the mixer."""

from __future__ import annotations

from torch import Tensor

from saccade import Site
from saccade.papers.agent_attention import (
    AUTHORS,
    MIXER,
    SIZES,
    TAPS,
    Agent,
    PrefixedAgent,
    ReducedAgent,
    WindowAgent,
    agent_deit,
    agent_pvt,
    agent_swin,
)
from tests.ports.port import Port, as_grid, as_tokens, key_map

HOSTS = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}


def side(agents: int | str) -> int:
    return round(int(agents) ** 0.5)


def build(golden: dict) -> Port:
    args, kind = golden["source"]["args"], golden["source"]["object"]
    common = dict(num_classes=args.get("num_classes", 1000), img_size=args.get("img_size", 224))
    pools = [side(agents) for agents in args["agent_num"]] if isinstance(args["agent_num"], list) else []
    if kind == "VisionTransformer":
        model = agent_deit(HOSTS[args["embed_dim"]], pools[0], args.get("agent_layer", args["depth"]), **common)
        return Port(model, key_map(AUTHORS("agent_deit_t")), taps=tapped("agent_deit_t", golden))
    if kind == "AgentSwinTransformer":
        agents = [pool if letter == "A" else None for pool, letter in zip(pools, args["attn_type"])]
        window, name = args["window_size"], f"swin_{'tiny' if args['depths'][2] == 6 else 'small'}"
        dims = tuple(args["embed_dim"] * 2**stage for stage in range(4))
        model = agent_swin(name, agents, window, max(7, window // 8), dims=dims, depths=tuple(args["depths"]),
                           heads=tuple(args["num_heads"]), **common)
        return Port(model, key_map(AUTHORS("agent_swin_t")), taps=tapped("agent_swin_t", golden))
    if kind.startswith("agent_pvt"):
        size = SIZES[f"agent_pvt_{kind.removeprefix('agent_pvt_')[0]}"]
        model = agent_pvt(size["dims"], size["depths"], pools=pools, **common)
        return Port(model, key_map(AUTHORS("agent_pvt_t")), taps=tapped("agent_pvt_t", golden))
    pool, bias = side(args["agent_num"]), args.get("qkv_bias", "window_size" in args)
    if "num_patches" in args:
        grid = (side(args["num_patches"]),) * 2
        site, reduction = Site(args["dim"], args["num_heads"], grid=grid), args.get("sr_ratio", 1)
        mixer = ReducedAgent(site, pool, reduction, bias) if reduction > 1 else Agent(site, pool, bias)
        return Port(mixer, key_map(MIXER), as_grid(grid), as_tokens)
    if "window" in args:
        grid = (args["window"],) * 2
        mixer = PrefixedAgent(Site(args["dim"], args["num_heads"], grid=grid), pool, bias)
        return Port(mixer, key_map(MIXER), lambda inputs: (inputs["x"][:, 1:].unflatten(1, grid), inputs["x"][:, :1]),
                    prefix_first)
    grid = tuple(args["window_size"])
    mixer = WindowAgent(Site(args["dim"], args["num_heads"], grid=grid), pool, grid[0], qkv_bias=bias)
    return Port(mixer, key_map(MIXER), as_grid(grid), as_tokens)


def prefix_first(result: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    import torch

    return {"out": torch.cat([result[1], result[0].flatten(1, -2)], 1)}


def tapped(name: str, golden: dict) -> dict[str, str]:
    import re

    return {what: match.expand(module) for what in golden["outputs"] for pattern, module in TAPS(name).items()
            if (match := re.fullmatch(pattern, what))}
