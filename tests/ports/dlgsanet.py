"""DLGSANet's modules: the whole network, dynamic convolution, sparse attention over channels."""

from __future__ import annotations

import torch

from saccade.papers.dlgsanet import AUTHORS, DYNAMIC, TAPS, DynamicConvolution, dlgsanet
from saccade.parts.restoration.transposed import TRANSPOSED, TransposedAttention
from saccade.tools.verify import find_taps
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    match golden["source"]["object"]:
        case "IDynamicDWConv":
            module = DynamicConvolution(args["channels"], args["kernel_size"], args["group_channels"])
            return Port(module, key_map(DYNAMIC), channels_last, channels_first)
        case "SparseAttention":
            tile = args["tlc_kernel"] if args["tlc_flag"] else None
            module = TransposedAttention(args["dim"], args["num_heads"], args["bias"], torch.relu, tile)
            return Port(module.eval(), key_map(TRANSPOSED), channels_last, channels_first)
    model = dlgsanet(args["upscale"], args["dim"], args["groups"], args["blocks"], args["window_size"],
                     args["idynamic_num_heads"], args["restormer_num_heads"], args["idynamic_ffn_expansion_factor"],
                     args["restormer_ffn_expansion_factor"], args["tlc_kernel"] if args["tlc_flag"] else None,
                     args["in_chans"])
    return Port(model.eval(), key_map(AUTHORS), taps=find_taps(TAPS, golden))
