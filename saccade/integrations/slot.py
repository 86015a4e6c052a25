"""Our mixers inside models that know nothing of us: watch one forward, then mimic.

    host = timm.create_model("vit_tiny_patch16_224")
    handle = saccade.swap(host, "blocks.*.attn", "neighborhood", prefix_mode="mean")

From the forward follow the layout, the prefix tokens, the stride, which argument is the tensor and whether a tuple is
due back; a Slot with the same manners then carries the mixer. What is not understood is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.core.build import mixer_factory
from saccade.core.errors import SaccadeError
from saccade.core.names import match_modules
from saccade.core.site import MixerFactory, Site
from saccade.core.swap import Handle, keep_projections, own_blocks, swap_own
from saccade.parts.plain import PrefixBlind, TokenBlock, beside_prefix
from saccade.parts.tokens import join

Grid = tuple[int, ...]
MOST_PREFIX = 16  # more are for the caller to say: with many prefix tokens, every smaller grid explains N
POSITION = ("rope", "pos")  # arguments so named tell where tokens are; the new mixer has its own way of knowing
# What pre-norm blocks around the attention of windows call their parts, in timm and in transformers.
WINDOW_BLOCKS = (("norm1", "attn", "norm2", "mlp"), ("layernorm_before", "attention", "layernorm_after", "mlp"))


def grids(image: Grid, stride: int) -> tuple[Grid, Grid]:
    """What a stride can make of an image: its sides rounded down, and rounded up."""
    return tuple(side // stride for side in image), tuple(-(-side // stride) for side in image)


class Manner(NamedTuple):
    """How tokens lie in a tensor ("BNC", "BHWC", "BCHW"), with how many prefix tokens, at which stride."""

    layout: str
    prefix: int
    stride: int

    def grid(self, shape: tuple[int, ...], image: Grid) -> Grid | None:
        """The grid on which a tensor of this shape lies, if it can come from an image of this size."""
        for grid in grids(image, self.stride):
            if self.layout == "BNC":
                fits = len(shape) == 3 and 0 < prod(grid) == shape[1] - self.prefix
            else:
                fits = grid == (shape[1:-1] if self.layout == "BHWC" else shape[2:])
            if fits:
                return grid
        return None


class Call(NamedTuple):
    """How a module was called: the shape of its tensor, and the length of the tuple due back (0: a tensor)."""

    shape: tuple[int, ...]
    due: int


class SeesWindows(SaccadeError):
    """A module is given the windows of a map one by one."""


class ImageSize:
    """A forward pre-hook that remembers the size of the image for the slots.

    An object, not a closure: deepcopy and pickle of a host take along the one that its own slots read.
    """

    size: Grid | None = None

    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        image = first_tensor(args, kwargs)
        assert image is not None, "a host is called with an image"
        self.size = tuple(image.shape[2:])


class Slot(nn.Module):
    """A mixer (B, *grid, C) with the manners of the module whose place it takes."""

    def __init__(self, name: str, mixer: nn.Module, manner: Manner, native: Grid, due: int, image: ImageSize) -> None:
        super().__init__()
        self.name, self.mixer, self.manner, self.native, self.due, self.image = name, mixer, manner, native, due, image

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, (layout, count, _) = the_tensor(self.name, args, kwargs), self.manner
        if layout == "BNC":
            prefix, tokens = x[:, :count], x[:, count:].unflatten(1, self.grid(x.shape))
            out = join(*self.mixer(tokens, prefix=prefix)) if count else self.mixer(tokens).flatten(1, -2)
        elif layout == "BHWC":
            out = self.mixer(x)
        else:
            out = self.mixer(x.movedim(1, -1).contiguous()).movedim(-1, 1)
        return (out, *[None] * (self.due - 1)) if self.due else out

    def grid(self, shape: torch.Size) -> Grid:
        """The grid of the image that came last, if it explains the shape, else the native one."""
        grid = self.manner.grid(shape, self.image.size) if self.image.size else None
        if grid is None and shape[1] == self.manner.prefix + prod(self.native):
            return self.native
        if grid is None:
            raise SaccadeError(f"{self.name}: {shape[1]} tokens are not {self.manner.prefix} of prefix and the grid of "
                               f"stride {self.manner.stride} on the image seen last, {self.image.size}; drop no tokens")
        return grid

    def extra_repr(self) -> str:
        return f"{self.manner.layout}, prefix={self.manner.prefix}, native={self.native}"


class AroundWindows(nn.Module):
    """x += path(mixer(norm(x))); x += path(mlp(norm(x))), with the parts of a block that cuts its map into windows."""

    def __init__(self, block: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        before, _, after, mlp = _window_block(block)
        self.norm1, self.mixer = block.get_submodule(before), mixer
        self.norm2, self.mlp = block.get_submodule(after), block.get_submodule(mlp)
        self.path = getattr(block, "drop_path", getattr(block, "drop_path1", nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.mixer(self.norm1(x)))
        return x + self.path(self.mlp(self.norm2(x)))


def swap(
    model: nn.Module,
    pattern: str,
    mixer: str | MixerFactory,
    keep_weights: bool = False,
    *,
    prefix_mode: str | None = None,
    example: Tensor | None = None,
    layout: str | None = None,
    prefix: int | None = None,
    **mixer_options: Any,
) -> Handle:
    """Put another mixer where those that `pattern` names stand: `swap(model, "stages.2.*.mixer", "neighborhood")`.

    `mixer` is a registered name or a callable `site -> Module`. `keep_weights` copies the trained qkv and output
    projections, where both mixers have them. Beside prefix tokens, a mixer that knows only the grid needs
    `prefix_mode`: they receive the mean of the mixed map ("mean") or nothing ("none": a class token that only such
    mixers feed learns nothing of the image). `undo()` of the handle restores the very same modules. In a model that is
    not ours, a forward of `example` (B, C, H, W), else of a zero image of the model's own size, is watched; `layout`
    ("BNC", "BHWC" or "BCHW") and `prefix` (how many tokens) overrule what it teaches. Where attention is given windows
    (Swin's), the mixer gets the whole map and its block gives up the windows, keeping norms and MLP. Raises
    SaccadeError where nothing matches and for what is not understood: masks, changed shapes, windows of other blocks.
    """
    factory = mixer_factory(mixer, **mixer_options) if isinstance(mixer, str) else partial(mixer, **mixer_options)
    if blocks := own_blocks(model, pattern):
        return swap_own(model, blocks, factory, keep_weights, partial(_beside, mode=prefix_mode))
    names = match_modules(model, pattern)
    names = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    image = _zero_image(model) if example is None else example
    size = tuple(image.shape[2:])
    taller = image.new_zeros(1, image.shape[1], 2 * size[0], *size[1:])
    attention: dict[str, str] = {}  # of a block that gives up its windows
    try:
        calls, entrance = watch(model, names, image)
        again = _watch_if_allowed(model, names, taller)
    except SeesWindows:
        attention = {name.rpartition(".")[0]: name for name in names}
        if not _can_give_up_windows(model, attention, image):
            raise
        calls, entrance = watch(model, list(attention), image)
        again = _watch_if_allowed(model, list(attention), taller)
    seen, new, stages = ImageSize(), dict[str, nn.Module](), dict[tuple[int, int], int]()
    for name, call in calls.items():
        shapes = {size: call.shape} | ({tuple(taller.shape[2:]): again[name].shape} if again else {})
        manner = learn(name, shapes, layout, prefix, getattr(model, "num_prefix_tokens", None))
        place = dim, stride = call.shape[1 if manner.layout == "BCHW" else -1], manner.stride
        index = stages.setdefault(place, 0)
        stages[place] += 1
        native = manner.grid(call.shape, size)
        assert native is not None  # `learn` has asked
        old = model.get_submodule(attention.get(name, name))
        built = factory(Site(dim, _heads(old, dim), list(stages).index(place), index, stride, native))
        if keep_weights:
            keep_projections(attention.get(name, name), old, built)
        if name in attention:
            built = AroundWindows(model.get_submodule(name), built)
        new[name] = Slot(name, beside_prefix(built, manner.prefix, prefix_mode), manner, native, call.due, seen)
    return Handle(model, new, [entrance.register_forward_pre_hook(seen, with_kwargs=True)])


def watch(host: nn.Module, names: Sequence[str], image: Tensor) -> tuple[dict[str, Call], nn.Module]:
    """One forward of `image`: the calls of the named modules, in their order, and the innermost module given the image.

    (The innermost, because `host.forward_features(image)` passes the hooks of the host itself by.) Raises SaccadeError
    for a call that no mixer could answer.
    """
    calls, given = dict[str, Call](), [host]

    def enter(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if any(value is image for value in (*args, *kwargs.values())) and module in list(given[-1].modules()):
            given.append(module)

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            windows = first_tensor(args, kwargs)
            if windows is not None and windows.shape[0] != image.shape[0]:
                raise _refused(name, f"it sees {windows.shape[0]} windows or groups of a batch of {image.shape[0]}, a "
                                     "mixer sees whole maps; name the module around it", SeesWindows)
            x = the_tensor(name, args, kwargs)
            out, *more = output if isinstance(output, tuple) else (output,)
            call = Call(tuple(x.shape), len(more) + 1 if isinstance(output, tuple) else 0)
            if any(value is not None for value in more):
                raise _refused(name, f"it returns {call.due} things, a mixer returns one")
            if not isinstance(out, Tensor) or out.shape != x.shape:
                raise _refused(name, f"it changes the shape {call.shape}, a mixer keeps it")
            if calls.setdefault(name, call) != call:
                raise _refused(name, f"one forward calls it with {calls[name].shape} and with {call.shape}")
        return hook

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in host.modules()]
    hooks += [host.get_submodule(name).register_forward_hook(leave(name), with_kwargs=True) for name in names]
    _run(host, image, hooks)
    if missing := [name for name in names if name not in calls]:
        raise _refused(missing[0], "a forward never calls it; name a module that is called")
    return calls, given[-1]


def _run(host: nn.Module, image: Tensor, hooks: Sequence[Any]) -> None:
    """One forward in evaluation, without gradients; then the hooks come off and what trained trains again."""
    training = {module: module.training for module in host.modules()}
    host.eval()
    try:
        with torch.no_grad():
            host(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def the_tensor(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor to mix among the arguments of a call; raises where another argument asks for more than mixing it."""
    named = {f"argument {place}": value for place, value in enumerate(args)} | dict(kwargs)
    x = first_tensor(args, kwargs)
    if x is None:
        raise _refused(name, "it is called without a tensor")
    for key, value in named.items():
        parts = value if isinstance(value, (tuple, list)) else [value]
        other = any(isinstance(part, Tensor) and part is not x for part in parts)
        if (other and not any(word in key for word in POSITION)) or (value is True and "causal" in key):
            raise _refused(name, f"it is given {key}, and a mixer takes no mask or context")
    return x


def learn(
    name: str, shapes: Mapping[Grid, tuple[int, ...]], layout: str | None, prefix: int | None, told: int | None
) -> Manner:
    """The likeliest manner in which tensors of these shapes lie on images of these sizes, {image: shape}.

    Likely is what the host has `told` of its prefix tokens, then a stride that divides the image, then a small prefix.
    """
    (image, first), *_ = shapes.items()
    strides = range(1, max(image) + 1)
    manners = {Manner(kind, 0, stride) for kind in ("BHWC", "BCHW") for stride in strides}
    manners |= {Manner("BNC", first[1] - prod(grid), stride) for stride in strides for grid in grids(image, stride)}
    fitting = [manner for manner in manners if layout in (None, manner.layout)
               and (0 <= manner.prefix <= MOST_PREFIX if prefix is None else manner.prefix == prefix)
               and all(manner.grid(shape, size) for size, shape in shapes.items())]
    if len({manner.layout for manner in fitting}) != 1:
        raise _refused(name, f"{'more than one' if fitting else 'no'} layout explains its input, {{image: shape}} = "
                             f"{shapes}, with layout={layout!r}, prefix={prefix!r}: say other ones")
    return min(fitting, key=lambda m: (m.prefix != told, any(side % m.stride for side in image), m.prefix, m.stride))


def _window_block(module: nn.Module) -> tuple[str, ...]:
    """The names of the parts of a block that cuts windows for its attention and holds nothing else that it learns."""
    parts = {name.partition(".")[0] for name, _ in module.named_parameters()}
    return next((names for names in WINDOW_BLOCKS if parts == set(names)), ())


def _can_give_up_windows(host: nn.Module, blocks: Iterable[str], image: Tensor) -> bool:
    """Whether all blocks are of norm, attention, norm and MLP, and call them in this order."""
    order: dict[str, list[str]] = {block: [] for block in blocks}
    parts = {block: _window_block(host.get_submodule(block)) for block in order}

    def called(block: str, part: str) -> Callable[..., None]:
        return lambda module, args, output: order[block].append(part)

    hooks = [host.get_submodule(f"{block}.{part}").register_forward_hook(called(block, part))
             for block in order for part in parts[block]]
    _run(host, image, hooks)
    return all(parts[block] and order[block] == [*parts[block]] for block in order)


def _watch_if_allowed(host: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, Call]:
    try:
        return watch(host, names, image)[0]
    except SaccadeError:
        raise
    except Exception:  # whatever a host raises at a size it does not know: then one size must do
        return {}


def _zero_image(host: nn.Module) -> Tensor:
    sizes = [getattr(part, key, None) for part in host.modules() for key in ("img_size", "image_size")]
    sizes.append(getattr(host, "default_cfg", {}).get("input_size", ())[1:])
    size = next((size for size in sizes if isinstance(size, (int, tuple, list)) and size), None)
    if size is None:
        raise SaccadeError(f"{type(host).__name__} does not say its image size: give example=, images (B, C, H, W)")
    channels = next((part.in_channels for part in host.modules() if isinstance(part, nn.Conv2d)), 3)
    like = next((tensor for tensor in host.parameters() if tensor.is_floating_point()), torch.zeros(()))
    return like.new_zeros(1, channels, *((size, size) if isinstance(size, int) else size))


def _heads(module: nn.Module, dim: int) -> int:
    """The host's own number of heads, else heads of 32 channels."""
    keys = ("num_heads", "heads", "num_attention_heads")
    told = [getattr(part, key, None) for part in module.modules() for key in keys]
    return next((heads for heads in told if isinstance(heads, int)), dim // 32 if dim % 32 == 0 else 1)


def _beside(block: nn.Module, mixer: nn.Module, mode: str | None) -> nn.Module:
    old = block.mixer
    knows = isinstance(block, TokenBlock) and (isinstance(old, PrefixBlind) or bool(getattr(old, "prefix", False)))
    return beside_prefix(mixer, int(knows), mode)


def _refused(name: str, why: str, kind: type[SaccadeError] = SaccadeError) -> SaccadeError:
    return kind(f"{name} cannot be swapped: {why}")
