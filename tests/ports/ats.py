"""ATS's modules: the whole network, one sampling block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from saccade import Site
from saccade.core.keymap import Dropped
from saccade.papers.ats import AUTHORS, RECORDED, TAPS, AtsBlock, ats_deit
from saccade.parts.attention import Attention
from saccade.parts.host import Kept
from saccade.parts.plain import TokenBlock
from saccade.tools.verify import find_taps
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "ViT":
        model = ats_deit(args["EMBED_DIM"], args["DEPTH"], args["NUM_HEADS"], patch=args["PATCH_SIZE"],
                         img_size=args["IMG_SIZE"], num_classes=args["NUM_CLASSES"], **RECORDED(golden))
        return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
    site, length = Site(args["dim"], args["num_heads"]), golden["inputs"]["x"]["shape"][1]
    inner = TokenBlock(site, Attention(site, qkv_bias=args["qkv_bias"]), norm=nn.LayerNorm)
    block = AtsBlock(length - 1, True, block=inner, prefix=1, kept=Kept(), first=True)

    def outputs(result: Tensor) -> dict[str, Tensor]:
        """Unpacked, zeros behind the tokens that stay."""
        return {"out": F.pad(result, [0, 0, 0, length - result.shape[1]]), "count": (block.kept.numbers >= 0).sum(1)}

    names = (Dropped(r"attn\.out_zero_mask", "a constant of zeros"), (r"attn\.(.*)", r"mixer.\1"))
    return Port(block, key_map(names), outputs=outputs)
