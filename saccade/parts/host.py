"""The transformer blocks of a host, ours or timm's, opened: where methods drop, merge or mask tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.swap import Handle
from saccade.ops.attend import attend
from saccade.parts.attention import Attention
from saccade.parts.plain import TokenBlock

# What stands between a branch and its sum, in order, where a block has it: ours, timm's.
TAILS = (("scale1", "ls1", "drop_path1"), ("scale2", "ls2", "drop_path2"))


class Kept:
    """The tokens that are left in a forward, by their numbers in the sequence that entered the first block.

    `numbers` is (B, N) or (1, N), of `count` tokens at first; -1 stands for a token made of several, and for padding.
    `sizes` (B, N) are the tokens that each is made of, where a method counts them.
    """

    count: int
    numbers: Tensor
    sizes: Tensor | None

    def start(self, tokens: Tensor) -> None:
        self.count, self.sizes = tokens.shape[1], None
        self.numbers = torch.arange(self.count, device=tokens.device)[None]

    def choose(self, index: Tensor, fused: int = 0, real: Tensor | None = None) -> None:
        """Keep the tokens `index` (B, N'), those that are `real`, and `fused` new ones after them."""
        numbers = self.numbers.expand(index.shape[0], -1).gather(1, index)
        numbers = numbers if real is None else numbers.masked_fill(~real, -1)
        self.numbers = torch.cat([numbers, numbers.new_full((numbers.shape[0], fused), -1)], 1)

    def padding_bias(self, like: Tensor) -> Tensor:
        """(B, 1, 1, N) to add to scores: -inf for padding (where nothing is fused, all that has no number)."""
        return torch.zeros_like(self.numbers, dtype=like.dtype).masked_fill(self.numbers < 0, -torch.inf)[:, None, None]

    def where(self) -> tuple[Tensor, Tensor]:
        """`where` of an attention of all tokens that are left to each other."""
        return self.numbers, self.numbers


class HostBlock(nn.Module):
    """x += tail1(proj(attend(qkv(norm1(x))))); x += tail2(mlp(norm2(x))), with the host block's own modules.

    They keep the names that they have in the host, so that its checkpoints fit before and after. tokens are
    (B, P + N, C), P prefix tokens first; what else the host hands to its blocks (ours: P and the grid) is not needed.
    A method overrides `forward`, and adds modules of its own.
    """

    def __init__(self, block: nn.Module, prefix: int, kept: Kept, first: bool) -> None:
        super().__init__()
        self.norm1: Any
        self.norm2: Any
        self.mlp: Any
        for name, child in block.named_children():
            self.add_module(name, child)
        self.prefix, self.kept, self.first = prefix, kept, first
        self._tails = [[name for name in names if name in self._modules] for names in TAILS]

    def drops(self) -> bool:
        """Whether fewer tokens may leave than came."""
        return False

    def whole(self, tokens: Tensor) -> Tensor:
        """All tokens of the picture, for a map, from those that left this block."""
        return tokens

    @property
    def attention(self) -> Any:
        """The host's attention: qkv and proj, in timm also norms of queries, keys and output."""
        return attention_of(self)

    @property
    def heads(self) -> int:
        return heads_of(self)

    def start(self, tokens: Tensor) -> None:
        """The first block of a host begins the count of kept tokens anew."""
        if self.first:
            self.kept.start(tokens)

    def queries_keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, heads, N, d), of norm1(tokens)."""
        attention = self.attention
        q, k, v = attention.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q, k, v

    def add_mixed(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """tokens + tail1(proj(mixed)), `mixed` (B, heads, N, d) as attention gives it."""
        attention, out = self.attention, mixed.transpose(1, 2).flatten(2)
        for name in ("norm", "proj", "proj_drop"):
            out = getattr(attention, name)(out) if hasattr(attention, name) else out
        return tokens + self._tail(0, out)

    def add_attention(self, tokens: Tensor) -> Tensor:
        """tokens + attention over all tokens that are left."""
        return self.add_mixed(tokens, attend(*self.queries_keys_values(tokens), where=self.kept.where))

    def after_prefix(self, places: Tensor) -> Tensor:
        """Places (B, M) of grid tokens as (B, P + M) of the sequence, all prefix tokens first."""
        always = torch.arange(self.prefix, device=places.device).expand(places.shape[0], -1)
        return torch.cat([always, places + self.prefix], 1)

    def add_mlp(self, tokens: Tensor) -> Tensor:
        """tokens + tail2(mlp(norm2(tokens)))."""
        return tokens + self._tail(1, self.mlp(self.norm2(tokens)))

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.start(tokens)
        return self.add_mlp(self.add_attention(tokens))

    def _tail(self, which: int, x: Tensor) -> Tensor:
        for name in self._tails[which]:
            x = self.get_submodule(name)(x)
        return x


def attention_of(block: nn.Module) -> Any:
    """The attention of a host's block, by the name that the host gives it."""
    return block.mixer if hasattr(block, "mixer") else block.attn


def heads_of(block: nn.Module) -> int:
    """The number of heads of a host's block."""
    attention = attention_of(block)
    return int(getattr(attention, "heads", None) or attention.num_heads)


def native_grid(model: Any) -> tuple[int, ...]:
    """The grid of patches at a host's own image size."""
    return tuple(model.grid if hasattr(model, "grid") else model.patch_embed.grid_size)


def class_attention(q: Tensor, k: Tensor, prefix: int, bias: Tensor | float = 0.0) -> Tensor:
    """How much the class token looks at each other token: the mean over heads of its softmax, (B, N) without prefix.

    q, k (B, heads, P + N, d); one row of the attention, not its whole map.
    """
    row = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias).softmax(-1)
    return row[:, :, 0, prefix:].mean(1)


def packed(stays: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, M) of the tokens that stay (B, N) in their order, M the most in a picture; which of them are real.

    Shorter pictures are filled with places of tokens that go: not real.
    """
    place = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :int(stays.sum(1).max())]
    return place, stays.gather(1, place)


def gathered(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, C) at index (B, N')."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def open_blocks(
    model: nn.Module, method: str, build: Callable[..., nn.Module], *, needs_class_token: bool = False
) -> Handle:
    """Put `build(number, block=..., prefix=..., kept=..., first=...)` in the place of every block of a host.

    Raises SaccadeError where the host is not a stack of blocks with softmax attention over all tokens.
    """
    blocks = blocks_of(model, method)
    for number, block in enumerate(blocks):
        _check(method, f"blocks.{number}", block)
    prefix = getattr(model, "num_prefix_tokens", None)
    prefix = getattr(model, "prefix_count", 0) if prefix is None else prefix
    if needs_class_token and not prefix:
        raise SaccadeError(f"{method} ranks tokens by the attention of the class token, and {type(model).__name__} has "
                           "none; choose a host with one, or a method that needs none (token_merging)")
    kept = Kept()
    return Handle(model, {f"blocks.{number}": build(number, block=block, prefix=prefix, kept=kept, first=not number)
                          for number, block in enumerate(blocks)})


def blocks_of(model: nn.Module, method: str) -> nn.ModuleList | nn.Sequential:
    """The blocks of a host; raises where it is no plain vision transformer."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise SaccadeError(f"{method} needs a plain vision transformer with .blocks (ours or timm's ViT, DeiT); "
                           f"{type(model).__name__} is none")
    return blocks


def chosen_layers(
    model: nn.Module, method: str, layers: Sequence[int] | None, of_twelve: Sequence[int] = ()
) -> frozenset[int]:
    """The numbers of a host's blocks that a method names, checked; negative ones count from the end.

    None are those `of_twelve` blocks, the published ones, at the same shares of the host's own depth.
    """
    depth = len(blocks_of(model, method))
    if layers is None:
        layers = [layer * depth // 12 for layer in of_twelve]
    for layer in layers:
        if not -depth <= layer < depth:
            raise SaccadeError(f"{method}: layers has {layer}, and the host has the blocks 0 to {depth - 1}")
    return frozenset(layer % depth for layer in layers)


def check_rate(method: str, name: str, rate: float) -> float:
    """A rate in (0, 1], else an error that names it."""
    if not 0 < rate <= 1:
        raise SaccadeError(f"{method}: {name}={rate}; give a rate above 0, at most 1")
    return rate


def _check(method: str, name: str, block: nn.Module) -> None:
    ours = type(block) is TokenBlock and type(block.mixer) is Attention and block.position is None
    attention: Any = getattr(block, "attn", None)
    timms = (type(block).__module__.startswith("timm.") and type(block).__name__ == "Block"
             and type(attention).__name__ == "Attention" and getattr(attention, "gate", None) is None)
    if isinstance(block, HostBlock):
        raise SaccadeError(f"{method}: another method is applied at {name}; undo it first")
    if not (ours or timms):
        inside = attention if attention is not None else getattr(block, "mixer", block)
        raise SaccadeError(f"{method} needs a residual block with softmax attention over all tokens, and {name} is a "
                           f"{type(block).__name__} with {type(inside).__name__}")
