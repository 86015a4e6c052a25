"""PPMA's network, its attention, full and decomposed, and its path mask."""

from __future__ import annotations

from torch import Tensor, nn

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.ppma import AUTHORS, MIXER, PATH, SIZES, PolylinePath, path_mask, ppma
from tests.ports.port import Port, key_map

FACTORIES = {"PPMAViT_T": "ppma_t", "PPMAViT_S": "ppma_s", "PPMAViT_B": "ppma_b"}


class PathMask(nn.Module):
    """The mask of a mixer without the rest of it."""

    def __init__(self, site: Site, whole: bool) -> None:
        super().__init__()
        mixer = PolylinePath(site)
        self.heads, self.whole = mixer.heads, whole
        self.steps, self.step_bias, self.log_rate = mixer.steps, mixer.step_bias, mixer.log_rate

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        masks = PolylinePath.masks(self, x)
        return path_mask(*masks) if self.whole else masks


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what.startswith("MambaAttention"):
        site = Site(args["embed_dim"], args["num_heads"], grid=tuple(x.shape[1:-1]))
        return Port(PolylinePath(site, "Chunk" in what), key_map(MIXER))
    if what == "PathEmbeding2D":
        site = Site(args["embed_dim"], args["nheads"], grid=tuple(x.shape[1:-1]))
        whole = not args.get("chunkwise_recurrent", False)
        port = Port(PathMask(site, whole), key_map(PATH))
        if not whole:
            port.outputs = lambda masks: {"out0": masks[0], "out1": masks[1]}
        return port
    common = dict(img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=x.shape[1])
    names = {"embed_dims": "dims", "depths": "depths", "num_heads": "heads", "mlp_ratios": "ratios",
             "chunkwise_recurrents": "decomposed", "projection": "projection"}
    settings = dict(SIZES[FACTORIES[what]]) if what in FACTORIES else {}
    settings |= {ours: args[name] for name, ours in names.items() if name in args}
    if "layerscales" in args:
        initial = args.get("layer_init_values", 1e-6)
        settings["layer_scales"] = [initial if scaled else None for scaled in args["layerscales"]]
    taps = {f"stage{number}": f"stages.{number}.downsample" for number in (1, 2, 3)} | {"stage4": "stages.3"}
    taps = {name: taps[name] for name in golden["outputs"] if name in taps}
    return Port(ppma(**settings | common), key_map(AUTHORS), taps=taps)
