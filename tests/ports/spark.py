"""SparK over a host of ours, and its sparse layers one by one."""

from __future__ import annotations

import re

from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.keymap import within
from saccade.core.load import key_maps
from saccade.core.site import Site
from saccade.papers.convnext import Depthwise
from saccade.papers.spark import AUTHORS, SparK, sparse
from saccade.parts.block import SingleBlock
from saccade.parts.convolution import GridConv2d
from saccade.parts.masking import spread
from saccade.parts.norm import BatchNorm
from tests.ports.port import Port, key_map

LAYERS = (
    (r"block\.dwconv\.(.*)", r"block.mixer.conv.\1"),
    (r"block\.pwconv(\d)\.(.*)", r"block.mlp.fc\1.\2"),
    (r"block\.gamma", "block.scale.0.gamma"),
)


class Recorded(SparK):
    """What the golden recorded: the picture, each picture's loss, the sparse maps."""

    def forward(self, image: Tensor, active: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        active = active[:, 0]
        maps = self.maps(image, active)
        guess = self.decode(maps, active)
        return {"rec_or_inp": self.painted(image, guess, active), "loss": self.errors(image, guess, active),
                **{f"feat{number}": one for number, one in enumerate(maps)}}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if "conv" in args:
        return Port(Layers(*args["conv"], args["block_ks"]), key_map(LAYERS), lambda inputs: tuple(inputs.values()),
                    lambda result: result)
    name = re.search(r"timm (\w+)", golden["source"]["object"])[1]
    host = create_model(name, num_classes=0)
    norms = {"bn": "batch", "ln": "layer"}
    module = Recorded(host, width=args["width"], norm=norms[args["densify_norm"]])
    names = within(key_maps(name)["authors"], r"sparse_encoder\.sp_cnn\.", "model.")
    return Port(module, key_map((*names, *AUTHORS)), lambda inputs: tuple(inputs.values()), lambda result: result)


class Layers(nn.Module):
    """A convolution with its batch norm in training, a layer norm beside it, a ConvNeXt block after, all sparse."""

    def __init__(self, dim: int, out_dim: int, kernel: int, stride: int, padding: int, block_kernel: int) -> None:
        super().__init__()
        self.conv = GridConv2d(dim, out_dim, kernel, stride, padding)
        self.bn, self.ln = BatchNorm(out_dim), nn.LayerNorm(out_dim, eps=1e-6)
        site = Site(out_dim)
        self.block = SingleBlock(site, Depthwise(site, block_kernel), layer_scale=1e-6)

    def train(self, mode: bool = True) -> Layers:
        super().train(mode)
        self.bn.train()
        return self

    def forward(self, image: Tensor, active: Tensor) -> dict[str, Tensor]:
        active = active[:, 0]
        conv = self.conv(image.movedim(1, -1))  # not within: the golden's image is whole
        with sparse(self, active):
            normed = self.bn(conv)
            found = {"block": self.block(self.ln(normed)), "conv": conv, "bn_train": normed, "ln": self.ln(conv)}
        return {name: (x * spread(active, tuple(x.shape[1:3]))[..., None]).movedim(-1, 1) for name, x in found.items()}
