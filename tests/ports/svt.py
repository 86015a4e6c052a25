"""SVT's networks, both forms of its scattering, and the wavelet transform under them."""

from __future__ import annotations

from torch import Tensor, nn

from saccade import Site, create_model
from saccade.core.keymap import Dropped, KeyMap, matrix_from_1x1
from saccade.golden import make_inputs
from saccade.ops.wavelet import dtcwt
from saccade.papers.svt import AUTHORS, ROW_SCATTERING, SCATTERING, RowScattering, Scattering
from saccade.tools.verify import taps
from tests.ports.port import Port, as_grid, as_tokens, channels_last, key_map

MIXERS = {"SVT_channel_mixing": (Scattering, SCATTERING),
          "SVT_channel_token_mixing": (RowScattering, ROW_SCATTERING)}
TRANSFORM: KeyMap = (Dropped(r"xfm\..*", "filters of the transform"), (r"proj\.weight", "proj.weight", matrix_from_1x1))


class Transform(nn.Module):
    """The golden's own linear layer, then the transform."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return dtcwt(self.proj(x))


def authors_layout(result: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """low (B, C, H, W), high (B, C, 6, H / 2, W / 2, 2)."""
    low, high = result
    return {"low": low.movedim(-1, 1), "high": high.permute(0, 5, 3, 1, 2, 4)}


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what == "DTCWTForward":
        return Port(Transform(x.shape[1]), key_map(TRANSFORM), channels_last, authors_layout)
    if what in MIXERS:  # sizes are the authors' business: they show in the weights alone
        kind, rules = MIXERS[what]
        grid = next(tuple(shape[1:]) for name, shape, _ in golden["state"] if name == "complex_weight_ll")
        return Port(kind(Site(args["dim"], grid=grid)), key_map(rules), as_grid(grid), as_tokens)
    model = create_model(what, img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 1000),
                         in_chans=x.shape[1])
    return Port(model, key_map(AUTHORS), taps=taps(what, golden))
