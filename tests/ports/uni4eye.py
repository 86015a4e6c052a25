"""Uni4Eye's patch embedding and its encoder of what is seen, pictures and volumes by one module."""

from __future__ import annotations

from torch import Tensor, nn

from saccade.core.keymap import within
from saccade.papers.uni4eye import AUTHORS, UnifiedPatchEmbed, uni4eye
from saccade.parts.masking import Visible
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "PatchEmbed23D":
        module = Both(UnifiedPatchEmbed(args["in_chans"], args["embed_dim"], args["patch_size"]))
        return Port(module, key_map(((r"(.*)", r"embed.\1"),)), outputs=lambda result: result)
    size = args["img_size"]
    model = uni4eye(args["embed_dim"], args["depth"], args["num_heads"], args["patch_size"], img_size=size,
                    num_classes=0)
    names = key_map((*within(AUTHORS, "", "model."), (r"(.*)", r"model.\1")))
    return Port(Seen(model), names, outputs=lambda result: result)


class Both(nn.Module):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, *images: Tensor) -> dict[str, Tensor]:
        return {f"tok{image.ndim - 2}d": self.embed(image).flatten(1, -2) for image in images}


class Seen(nn.Module):
    """Half of the tokens, those of the least noise, in its order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        half, found = len(inputs) // 2, {}
        for image, noise in zip(inputs[:half], inputs[half:], strict=True):
            order = noise.argsort(1)
            kept = int(noise.shape[1] * 0.5)
            found[f"latent{image.ndim - 2}d"] = Visible(self.model, "uni4eye")(image, order[:, :kept])
            found[f"mask{image.ndim - 2}d"] = (order.argsort(1) >= kept).to(image.dtype)
        return found
