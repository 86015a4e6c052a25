"""EViT's modules: the whole network, one shrinking block."""

from __future__ import annotations

from torch import Tensor, nn

from saccade import Site
from saccade.papers.evit import AUTHORS, RECORDED, TAPS, EvitBlock, evit_deit
from saccade.parts.attention import Attention
from saccade.parts.host import Kept
from saccade.parts.plain import TokenBlock
from saccade.tools.verify import find_taps
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "EViT":
        model = evit_deit(args["embed_dim"], args["depth"], args["num_heads"], patch=args["patch_size"],
                          img_size=args["img_size"], num_classes=args.get("num_classes", 1000), **RECORDED(golden))
        return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
    site = Site(args["dim"], args["num_heads"])
    inner = TokenBlock(site, Attention(site, qkv_bias=args["qkv_bias"]), norm=nn.LayerNorm)
    block = EvitBlock(True, args["keep_rate"], args["fuse_token"], block=inner, prefix=1, kept=Kept(), first=True)

    def outputs(result: Tensor) -> dict[str, Tensor]:
        numbers = block.kept.numbers[:, 1:]
        return {"out": result, "kept_idx": (numbers[:, :-1] if args["fuse_token"] else numbers) - 1}

    return Port(block, key_map(((r"attn\.(.*)", r"mixer.\1"),)), outputs=outputs)
