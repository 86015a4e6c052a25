"""HyperZZW's operators, Terminator's parts, the whole network."""

from __future__ import annotations

from torch import Tensor, nn

from saccade.core.keymap import within
from saccade.golden import make_inputs
from saccade.papers.hyperzzw import (
    AUTHORS,
    GATE,
    INTERACT,
    LOCAL,
    SLOW,
    TAPS,
    GroupStandardisation,
    HyperInteract,
    LocalZZW,
    RecurrentGate,
    SlowNet,
    Terminator,
    product,
)
from saccade.tools.verify import find_taps
from tests.ports.port import Port, channels_first, channels_last, key_map


class GlobalProduct(nn.Module):
    """The kernel times the map, in the authors' operator without the map in the kernel."""

    def __init__(self, slow: SlowNet) -> None:
        super().__init__()
        self.slow = slow

    def forward(self, x: Tensor) -> Tensor:
        return product(self.slow(tuple(x.shape[1:-1])).expand_as(x), x)


class Twice(nn.Module):
    """A module of two inputs on the same one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    hidden, layers, omega = args.get("no_hidden", 64), args.get("num_layers", 2), args.get("omega_0", 10.0)
    match golden["source"]["object"]:
        case "G_IBS":
            module, names = GroupStandardisation(args["channels"], args["group_num"]), ()
        case "RGU":
            module, names = RecurrentGate((args["bias_size"],) * args["data_dim"], args["in_channels"]), GATE
        case "HyperInteract":
            size = (args["size"],) * 2
            module = Twice(HyperInteract(size, args["channel"], (hidden,) * 2, (layers,) * 2, omega))
            names = within(INTERACT, "", "inner.")
        case "HyperZZW_G + SlowNet_G":
            slow = SlowNet((args["size"],) * 2, args["in_channels"], hidden, layers, omega)
            module, names = GlobalProduct(slow), within(SLOW, r"slow\.", "slow.")
        case "HyperZZW_L + SlowNet_L":
            local = LocalZZW(args["kernel_size"], args["in_channels"], hidden, layers, omega)
            module, names = Twice(local), within(LOCAL, "", "inner.")
        case "Terminator_image":
            return _network(golden, args)
        case what:
            raise NotImplementedError(what)
    return Port(module, key_map(names), channels_last, channels_first)


def _network(golden: dict, args: dict) -> Port:
    image = next(iter(make_inputs(golden).values()))
    wide, local = args["kernel_g"], args["kernel_l"]
    channel, places = args["kernel_gc_hi"], args["kernel_gs_hi"]
    dims = [dim * factor for dim, factor in zip(args["in_channel"], args["bottleneck_factors"])]
    model = Terminator(
        dims, layers=wide["num_layers_list"], groups=args.get("group_num", 12), hidden=wide["no_hidden"],
        kernels=local["sizes"], local_net=(local["no_hidden"], local["num_layers"]),
        channel_net=(args["kernel_gc"]["no_hidden"], args["kernel_gc"]["num_layers"]),
        interact_nets=((channel["no_hidden"], channel["num_layers"]), (places["no_hidden"], places["num_layers"])),
        omega=args.get("omega_0", 10.0), num_classes=args["out_channels"], in_chans=args["in_channels"],
        img_size=tuple(image.shape[2:]),
    )
    return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
