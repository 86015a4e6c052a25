"""A plain transformer opened, whosever it is: its layers' modules by their roles, and what enters and leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.evaluation import evaluation

# What a module or attribute is called, in a block of ours, timm's or transformers' (ViT of two ages, BERT, GPT-2).
ROLES: dict[str, tuple[str, ...]] = {
    "norm1": ("norm1", "layernorm_before", "attention.output.LayerNorm", "ln_1"),
    "qkv": ("mixer.qkv", "attn.qkv", "attn.c_attn"),
    "q": ("attention.q_proj", "attention.attention.query", "attention.self.query"),
    "k": ("attention.k_proj", "attention.attention.key", "attention.self.key"),
    "v": ("attention.v_proj", "attention.attention.value", "attention.self.value"),
    "out": ("mixer.proj", "attn.proj", "attention.o_proj", "attention.output.dense", "attn.c_proj"),
    "scale1": ("scale1", "ls1"),
    "norm2": ("norm2", "layernorm_after", "output.LayerNorm", "ln_2"),
    "fc1": ("mlp.fc1", "intermediate.dense", "mlp.c_fc"),
    "activation": ("mlp.activation", "mlp.act", "mlp.activation_fn", "intermediate.intermediate_act_fn"),
    "fc2": ("mlp.fc2", "output.dense", "mlp.c_proj"),
    "scale2": ("scale2", "ls2"),
}
HEADS = ("mixer.heads", "attn.num_heads", "attention.num_attention_heads", "attention.attention.num_attention_heads",
         "attention.self.num_attention_heads")
# The same, of a whole model.
PARTS = {
    "blocks": ("blocks", "vit.layers", "vit.encoder.layer", "bert.encoder.layer", "transformer.h"),
    "norm": ("norm", "vit.layernorm", "transformer.ln_f"),
    "pooler": ("bert.pooler",),
    "pooled_norm": ("fc_norm",),
    "head": ("head", "classifier", "lm_head"),
}


@dataclass(frozen=True)
class Layer:
    """A layer's modules by their roles, those of ROLES; `post`: its norms stand after the sums."""

    modules: Mapping[str, Any]
    heads: int
    post: bool = False
    causal: bool = False

    def weights(self, role: str) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias of a linear layer; of the three in one that is fused, that of `role`."""
        fused = role in ("q", "k", "v") and "qkv" in self.modules
        module = self.modules["qkv" if fused else role]
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        if not fused:
            return weight, module.bias
        which = ("q", "k", "v").index(role)
        return weight.chunk(3)[which], None if module.bias is None else module.bias.chunk(3)[which]


class Opened:
    """`model(*inputs, **named)` called once, in evaluation mode: what it is made of and what went through.

    `layers`; `tokens` (B, T, C) that enter the first; `mask` that is added to attention's logits, if any; what comes
    after the layers, `ends` (those of PARTS that there are); `scores`. Raises SaccadeError where a layer is not known.
    """

    def __init__(self, model: nn.Module, *inputs: Any, **named: Any) -> None:
        self.ends = {part: found for part, names in PARTS.items() if (found := _named(model, names)) is not None}
        blocks = self.ends.pop("blocks", None)
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks) or "head" not in self.ends:
            raise SaccadeError(f"{type(model).__name__} is no plain transformer with a head: give one (deit_small, "
                               "vit_base, timm's ViT, transformers' ViT, BERT or GPT-2)")
        self.layers = [_layer(block) for block in blocks]
        self.tokens, self.mask, self.scores = _watched(model, blocks[0], inputs, named)
        if self.layers[0].causal:
            future = torch.ones(self.tokens.shape[1], self.tokens.shape[1], device=self.tokens.device).triu(1)
            self.mask = future.to(self.tokens).masked_fill(future > 0, torch.finfo(self.tokens.dtype).min)
        # The token that is classified, or the mean of those behind the prefix.
        self.pools_token = getattr(model, "global_pool", "token") == "token"
        self.prefix = getattr(model, "prefix_count", getattr(model, "num_prefix_tokens", 1))


def _named(module: Any, names: Sequence[str]) -> Any:
    """The first of the names that the module has, None where it has none."""
    for name in names:
        try:
            return attrgetter(name)(module)
        except AttributeError:
            continue
    return None


def _layer(block: nn.Module) -> Layer:
    found = {role: module for role, names in ROLES.items() if (module := _named(block, names)) is not None}
    heads = _named(block, HEADS)
    missing = [role for role in ROLES if role not in found and not role.startswith("scale")
               and role not in (("q", "k", "v") if "qkv" in found else ("qkv",))]
    if missing or heads is None:
        raise SaccadeError(f"{type(block).__name__} has no {missing[0] if missing else 'heads'} that is known here: "
                           "this needs blocks of attention and MLP")
    return Layer(found, heads, post=_named(block, ("output.LayerNorm",)) is not None,
                 causal=_named(block, ("attn.c_attn",)) is not None)


@torch.no_grad()
def _watched(
    model: nn.Module, first: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tokens that enter the first layer, the mask that is added to attention's logits, the scores."""
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, given: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        seen["tokens"] = given[0] if given else by_name["hidden_states"]
        second = given[1] if len(given) > 1 else by_name.get("attention_mask")
        seen["mask"] = second if isinstance(second, Tensor) and second.ndim == 4 else None

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with evaluation(model):
            scores = getattr(found := model(*inputs, **named), "logits", found)
    finally:
        handle.remove()
    mask = seen["mask"]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return seen["tokens"], mask, scores
