"""T-TAME's attention on given maps or tokens, and on a frozen ViT with torchvision's names."""

from __future__ import annotations

import math
import re

from torch import Tensor, nn

from saccade.core.keymap import without_first_axis
from saccade.papers.t_tame import FeatureAttention, Tame, token_map
from saccade.papers.vit import vit
from tests.ports.port import Port, key_map

ATTENTION = ((r"am\.bns\.(.*)", r"norms.\1"), (r"am\.(.*)", r"\1"))
_BLOCK = r"body\.encoder\.layers\.encoder_layer_(\d+)\."
WHOLE = (
    (r"attn_mech\.1\.bns\.(.*)", r"attention.norms.\1"),
    (r"attn_mech\.1\.(.*)", r"attention.\1"),
    (r"body\.class_token", "body.prefix", without_first_axis),
    (r"body\.conv_proj\.(.*)", r"body.stem.proj.\1"),
    (r"body\.encoder\.pos_embedding", "body.position"),
    (_BLOCK + r"ln_([12])\.(.*)", r"body.blocks.\1.norm\2.\3"),
    (_BLOCK + r"self_attention\.in_proj_(.*)", r"body.blocks.\1.mixer.qkv.\2"),
    (_BLOCK + r"self_attention\.out_proj\.(.*)", r"body.blocks.\1.mixer.proj.\2"),
    (_BLOCK + r"mlp\.(?:0|linear_1)\.(.*)", r"body.blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.(?:3|linear_2)\.(.*)", r"body.blocks.\1.mlp.fc2.\2"),
    (r"body\.encoder\.ln\.(.*)", r"body.norm.\1"),
    (r"body\.heads\.head\.(.*)", r"body.head.\1"),
)


class Both(Tame):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        logits, c = self.look(image)
        return {"c": c, "logits": logits}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if "vit" in args:
        size = args["vit"]
        body = vit(size["hidden_dim"], size["num_layers"], size["num_heads"], size["patch_size"],
                   img_size=size["image_size"])
        layers = [int(re.search(r"encoder_layer_(\d+)", name)[1]) for name in args["feature_layers"]]
        return Port(Both(body, layers), key_map(WHOLE), outputs=lambda result: result)
    module: nn.Module = FeatureAttention(args["channels"], args["num_classes"])

    def inputs(given: dict[str, Tensor]) -> tuple[list[Tensor]]:
        maps = list(given.values())
        if maps[0].ndim == 3:
            side = math.isqrt(maps[0].shape[1] - 1)
            maps = [token_map(tokens, (side, side)) for tokens in maps]
        return (maps,)

    return Port(module, key_map(ATTENTION), inputs, lambda c: {"c": c, "a": c.sigmoid()})
