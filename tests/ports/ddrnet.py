"""DDRNet, with and without its auxiliary head, and its pyramid pooling."""

from __future__ import annotations

from torch import nn

from saccade.golden import make_inputs
from saccade.papers.ddrnet import DAPPM, DAPPM_NAMES, HEAD_NAMES, DDRNet, SegmentationHead, names, taps
from tests.ports.port import Port, channels_first, channels_last, key_map


class Both(nn.Module):
    """Both heads' logits, as the authors' network gives them in evaluation too."""

    def __init__(self, model: DDRNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, image):
        middle, x = self.model.run(image)
        return [self.model.head(x).movedim(-1, 1), self.model.auxiliary(middle).movedim(-1, 1)]


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what == "DAPPM":
        return Port(DAPPM(2, args["inplanes"], args["branch_planes"], args["outplanes"]), key_map(DAPPM_NAMES),
                    channels_last, channels_first)
    if what == "segmenthead":
        return Port(SegmentationHead(2, args["inplanes"], args["interplanes"], args["outplanes"]), key_map(HEAD_NAMES),
                    channels_last, channels_first)
    fusions = 2 if any(name.startswith("layer3_1.") for name, *_ in golden["state"]) else 1
    depths = tuple(args["layers"])
    detail = (depths[2] // fusions, depths[3]) if fusions > 1 else (2, 2)
    image = next(iter(make_inputs(golden).values()))
    model = DDRNet(args.get("planes", 64), depths, pool=args.get("spp_planes", 128),
                   hidden=args.get("head_planes", 128), fusions=fusions, detail_depths=detail,
                   auxiliary=args.get("augment", False), num_classes=args.get("num_classes", 19),
                   img_size=tuple(image.shape[2:]))
    where = {name: place for name, place in taps(fusions).items() if name in golden["outputs"]}
    if not model.auxiliary:
        return Port(model, key_map(names(fusions)), taps=where)
    rules = tuple((theirs, f"model.{ours}", *rest) for theirs, ours, *rest in names(fusions))
    return Port(Both(model), key_map(rules), taps={name: f"model.{place}" for name, place in where.items()})
