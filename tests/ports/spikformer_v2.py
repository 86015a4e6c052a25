"""Spikformer's modules: the networks for CIFAR and ImageNet, their attention, neurons, blocks and stems."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from saccade import Site
from saccade.golden import make_inputs
from saccade.ops.spiking import fire
from saccade.papers.spikformer_v2 import (
    AUTHORS,
    BLOCK,
    MIXER,
    MLP,
    RECORDED,
    STEM,
    TAPS,
    PatchSplitting,
    SpikingAttention,
    SpikingBlock,
    SpikingMlp,
    spikformer,
)
from saccade.tools.verify import find_taps
from tests.ports.port import Port, State, key_map


class Doubled(nn.Module):
    """The neurons' golden: `fire` of twice the input, steps first."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return fire(2 * x, self.threshold)


class OnTokens(SpikingBlock):
    """A block on maps instead of sequences."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.flatten(1, -2), 0, tuple(x.shape[1:-1])).view(x.shape)


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    for_cifar = golden["source"]["file"].startswith("cifar")
    said = RECORDED(golden)
    if what == "MultiStepLIFNode":
        return Port(Doubled(args.get("v_threshold", 1.0)), key_map(()))
    attention = dict(pairwise=for_cifar, qkv_bias=for_cifar)
    if what == "Spikformer":
        patch = args.get("patch_size", 16)
        model = spikformer(args["embed_dims"], args["depths"], args["num_heads"], 4 if for_cifar else 16,
                           args.get("T", 4), ratio=args.get("mlp_ratios", 4), num_classes=args["num_classes"],
                           in_chans=args["in_channels"], img_size=tuple(x.shape[2:]), **attention, **said)
        assert patch == (4 if for_cifar else 16), "the authors' stems have one stride each"
        return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
    steps, tokens_last = x.shape[0], x.ndim == 4  # (T, B, N, C), else (T, B, C, H, W)
    if what == "SPS":
        dim = args.get("embed_dims", 256)
        stem = PatchSplitting(2, x.shape[2], dim, steps, said.get("threshold", 1.0), pools=2 if for_cifar else 4)
        return Port(_EveryStep(stem), lambda state: _inside(key_map(STEM)(state)), outputs=_laid_out(
            steps, tokens_last=for_cifar), inputs=lambda inputs: (next(iter(inputs.values())).flatten(0, 1),))
    dim = x.shape[-1] if tokens_last else x.shape[2]
    grid = tuple(x.shape[2:3] if tokens_last else x.shape[3:])
    site = Site(dim, args.get("num_heads", 8), grid=grid)

    def inputs(given: State) -> tuple[Tensor, ...]:
        value = next(iter(given.values())).flatten(0, 1)
        return (value if tokens_last else value.movedim(1, -1).contiguous(),)

    mlp = partial(SpikingMlp, steps=steps, **said)
    match what:
        case "SSA":
            module, names = SpikingAttention(site, steps, **attention, **said), MIXER
        case "MLP":
            hidden = args.get("hidden_features") or dim
            module, names = mlp(dim, ratio=hidden / dim), MLP
        case "Block":
            mixer = SpikingAttention(site, steps, **attention, **said)
            module = OnTokens(site, mixer, norm=nn.LayerNorm, mlp=partial(mlp, ratio=args.get("mlp_ratio", 4.0)))
            names = BLOCK
        case _:
            raise NotImplementedError(what)
    return Port(module, key_map(names), inputs, _laid_out(steps, tokens_last))


class _EveryStep(nn.Module):
    """A stem whose input differs from step to step, as a golden's may."""

    def __init__(self, stem: PatchSplitting) -> None:
        super().__init__()
        self.stem = stem
        stem.layers[0].driven = stem.layers[0].forward

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


def _inside(state: State) -> State:
    return {f"stem.{name}": value for name, value in state.items()}


def _laid_out(steps: int, tokens_last: bool):
    """Ours (T x B, *grid, C) as the authors' (T, B, N, C) or (T, B, C, H, W)."""
    def outputs(result: Tensor) -> State:
        value = result.flatten(1, -2) if tokens_last else result.movedim(-1, 1)
        return {"out": value.unflatten(0, (steps, -1))}
    return outputs
