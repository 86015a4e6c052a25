"""PoolFormer's and MetaFormer's networks, the PoolFormer block, the pooling mixer."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from saccade import Site
from saccade.core.keymap import matrix_from_1x1
from saccade.golden import make_inputs
from saccade.papers.metaformer import AUTHORS, NORMS, SIZES, TAPS, Pooling, metaformer
from saccade.parts.block import Block
from saccade.parts.mlp import Mlp
from tests.ports.port import Port, channels_first, channels_last, key_map

BLOCK = (
    (r"layer_scale_(\d)", r"scale\1.0.gamma"),
    (r"(mlp\.fc\d\.weight)", r"\1", matrix_from_1x1),
)


class PoolingThenLinear(nn.Sequential):
    """The golden's own harness: the parameter-free operator, then a 1x1 convolution."""

    def __init__(self, kernel: int, dim: int) -> None:
        super().__init__(Pooling(Site(dim), kernel), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    match what:
        case "Pooling":
            module = PoolingThenLinear(args.get("pool_size", 3), image.shape[1])
            return Port(module, key_map(((r"1\.weight", "1.weight", matrix_from_1x1),)), channels_last, channels_first)
        case "PoolFormerBlock":
            site = Site(args["dim"], grid=tuple(image.shape[2:]))
            scale = args.get("layer_scale_init_value", 1e-5) if args.get("use_layer_scale", True) else None
            block = Block(site, Pooling(site, args.get("pool_size", 3)), norm=NORMS["group"], layer_scale=scale,
                          mlp=partial(Mlp, ratio=args.get("mlp_ratio", 4.0)))
            return Port(block, key_map(BLOCK), channels_last, channels_first)
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000))
    if what == "PoolFormer":
        model = metaformer(tuple(args["embed_dims"]), tuple(args["layers"]), pool=args.get("pool_size", 3), **common)
        taps = TAPS("poolformer_s12")
    else:
        name = what.removesuffix("_224").lower()
        model, taps = metaformer(**SIZES[name] | common), TAPS(name)
    return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
