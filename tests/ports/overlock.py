"""OverLoCK's networks, its Base-Net and Focus-Net blocks, and the ContMix block for use elsewhere."""

from __future__ import annotations

from torch import nn

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.overlock import (
    AUTHORS,
    BASE,
    BLOCK,
    TAPS,
    ContMixBlock,
    FocusBlock,
    LargeKernelBlock,
    large_kernel,
)
from saccade.parts.block import Affine
from saccade.parts.contmix import ContMix
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    size = tuple(next(iter(make_inputs(golden).values())).shape[2:])
    if what not in ("ContMixBlock", "DynamicConvBlock", "RepConvBlock"):
        model = create_model(what, img_size=size, num_classes=args.get("num_classes", 1000))
        taps = {key: at for key, at in TAPS(what).items() if key in golden["outputs"]}
        return Port(model, key_map(AUTHORS), taps=taps)
    dim, kernel, scale = args.get("dim", 64), args.get("kernel_size", 7), args.get("ls_init_value")
    site = Site(dim, args.get("num_heads", 2), grid=size)
    options = dict(kernel=kernel, ratio=args.get("mlp_ratio", 4), scale=scale)
    if what == "RepConvBlock":
        base = LargeKernelBlock(site, large_kernel(site, kernel), ratio=options["ratio"], scale=scale)
        return Port(after_branch(base, args), key_map(BASE), channels_last, channels_first)
    small = args.get("smk_size", 5)
    if what == "ContMixBlock":
        block = ContMixBlock(site, ContMix(site, kernel, small), **options)
        return Port(after_branch(block, args), key_map(BLOCK), channels_last, channels_first)
    context = args.get("ctx_dim", 32) // 4
    block = FocusBlock(site, ContMix(site, kernel, small, context), context=context, first=args.get("is_first", False),
                       **options)

    def outputs(pair):
        return {"out0": pair[0].movedim(-1, 1), "out1": pair[1].movedim(-1, 1)}

    return Port(after_branch(block, args), key_map(BLOCK), channels_last, outputs)


def after_branch(block: nn.Module, args: dict) -> nn.Module:
    """Without `res_scale` the authors' layer scale stands after the branch, which no published size has."""
    if not args.get("res_scale", False):
        assert not any(isinstance(part, Affine) for name, part in block.named_children() if name.startswith("keep"))
    return block
