"""TextPromptIR: one network that removes whatever a sentence says.

A U-shaped network of channel attention and gated convolutions, told by a sentence's embedding what to take out. Before
each of them the embedding e, brought to the width of the map, is weighed by what the picture shows in each channel, and
scales and shifts the map,
    e' = sigmoid(conv1d(mean of x)) e,      x <- gamma(e') x + beta(e'),   gamma and beta linear.

Yan, Jiang, Chen, Ning, Yin, Zhong, "Textual Prompt Guided Image Restoration", 2023, section 3.

Any picture: its sides are reflected to multiples of 8. Quirks kept: both blocks of the upper half that see 96 channels
have one head, the third level up has two; the kernel of the weighing grows with the width as ECA-Net's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, within
from saccade.parts.restoration.body import reflected
from saccade.parts.restoration.transposed import GATED, TRANSPOSED, GatedConvolution, TransposedAttention

CARD = Card(
    "Textual Prompt Guided Image Restoration",
    authors="Yan, Jiang, Chen, Ning, Yin, Zhong",
    year=2023,
    systems=("text_prompt_ir",),
    arxiv="2312.06162",
    code="MoTong-AI-studio/TextPromptIR@7d64b39",
    licence="unknown",
    read="paper",
    keywords="all-in-one image restoration, text prompt, transposed attention, gated convolution, sentence embedding",
    kinds=("restoration",),
    goldens=("text_prompt_ir_1111", "op_text_prompt_ir_attention"),
    tests=("tests/papers/test_text_prompt_ir.py",),
)

SENTENCE, PROMPT = 768, 384


class Prompted(nn.Module):
    """layer(gamma(e') x + beta(e')), e' = sigmoid(conv1d(mean of x)) W e: (B, H, W, C), (B, 384) -> (B, H, W, C)."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.narrow = nn.Linear(PROMPT, dim)
        kernel = int(abs(log2(dim) / 2 + 0.5))
        kernel += 1 - kernel % 2
        self.weigh = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        self.gamma, self.beta = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layer = layer

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        shown = self.weigh(x.mean((1, 2))[:, None])[:, 0].sigmoid()
        prompt = (shown * self.narrow(prompt))[:, None, None]
        return self.layer(self.gamma(prompt) * x + self.beta(prompt))


class PromptBlock(nn.Module):
    """x += attention(norm(x), e); x += gated(norm(x), e)."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = Prompted(dim, TransposedAttention(dim, heads))
        self.mlp = Prompted(dim, GatedConvolution(dim, ratio))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x), prompt)
        return x + self.mlp(self.norm2(x), prompt)


class Level(nn.ModuleList):
    """Blocks in a row, on (B, C, H, W)."""

    def forward(self, image: Tensor, prompt: Tensor) -> Tensor:
        x = image.movedim(1, -1)
        for block in self:
            x = block(x, prompt)
        return x.movedim(-1, 1)


class TextPromptIR(nn.Module):
    """image (B, C, H, W), sentence (B, 768) -> image (B, C, H, W): the picture plus what the network makes of it.

    `sentence` is the embedding of what to do (see `embed`). `depths` are the blocks of the levels, the last of them at
    an eighth of the size; `refine` are those of a last level at full size.
    """

    scale = 1

    def __init__(self, dim: int, depths: Sequence[int], refine: int, ratio: float, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans

        def level(times: int, heads: int, depth: int) -> Level:
            return Level(PromptBlock(times * dim, heads, ratio) for _ in range(depth))

        def conv(wide: int, out: int, kernel: int = 3) -> nn.Conv2d:
            return nn.Conv2d(wide, out, kernel, padding=kernel // 2, bias=False)

        self.words = nn.Sequential(nn.Linear(SENTENCE, 576), nn.LeakyReLU(0.2), nn.Linear(576, PROMPT),
                                   nn.LeakyReLU(0.2))
        self.stem = conv(in_chans, dim)
        self.encoder = nn.ModuleList(level(2**i, 2**i, depths[i]) for i in range(4))
        self.down = nn.ModuleList(nn.Sequential(conv(2**i * dim, 2**i * dim // 2), nn.PixelUnshuffle(2))
                                  for i in range(3))
        self.up = nn.ModuleList(nn.Sequential(conv(2 ** (i + 1) * dim, 2 ** (i + 2) * dim), nn.PixelShuffle(2))
                                for i in range(3))
        self.join = nn.ModuleList([nn.Identity(), conv(4 * dim, 2 * dim, 1), conv(8 * dim, 4 * dim, 1)])
        self.decoder = nn.ModuleList([level(2, 1, depths[0]), level(2, 2, depths[1]), level(4, 2, depths[2])])
        self.refine = level(2, 1, refine)
        self.last = conv(2 * dim, in_chans)

    def forward(self, image: Tensor, sentence: Tensor | None = None) -> Tensor:
        if sentence is None or sentence.shape != (len(image), SENTENCE):
            found = "nothing" if sentence is None else tuple(sentence.shape)
            raise SaccadeError(f"text_prompt_ir restores by a sentence: give model(image, sentence) with its embedding "
                               f"({len(image)}, {SENTENCE}), as `embed` makes it (given: {found})")
        height, width = image.shape[2:]
        prompt = self.words(sentence)
        whole = reflected(image, 8)
        x, seen = self.stem(whole), []
        for encoder, down in zip(self.encoder, self.down, strict=False):
            seen.append(encoder(x, prompt))
            x = down(seen[-1])
        x = self.encoder[3](x, prompt)
        for i in (2, 1, 0):
            x = self.decoder[i](self.join[i](torch.cat([self.up[i](x), seen[i]], 1)), prompt)
        return (self.last(self.refine(x, prompt)) + whole)[..., :height, :width]


def embed(sentences: Sequence[str], encoder: nn.Module, tokenizer: Callable[..., Any]) -> Tensor:
    """Sentences as (B, 768): what BERT (transformers' model and tokenizer) makes of the token before each."""
    tokens = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    state: Tensor = encoder(**tokens).last_hidden_state[:, 0]
    if state.shape[-1] != SENTENCE:
        raise SaccadeError(f"this encoder makes embeddings of {state.shape[-1]} numbers: take one of {SENTENCE}")
    return state


SIZES: dict[str, dict[str, Any]] = {"text_prompt_ir": {}}


def text_prompt_ir(
    dim: int = 48,
    depths: Sequence[int] = (4, 6, 6, 8),
    refine: int = 4,
    ratio: float = 2.66,
    in_chans: int = 3,
) -> TextPromptIR:
    """A TextPromptIR of so many blocks a level."""
    return TextPromptIR(dim, depths, refine, ratio, in_chans)


_UNUSED = "of the linear layers for every width of the network one set is used"


def prompted(number: int, layer: KeyMap) -> KeyMap:
    """The authors' names of a `Prompted` whose width is their `number`: 1, 2, 3, 7 for 48, 96, 192, 384 channels."""
    return (
        (rf"linear{number}\.(.*)", r"narrow.\1"),
        (rf"linear{number}_1\.(.*)", r"gamma.\1"),
        (rf"linear{number}_2\.(.*)", r"beta.\1"),
        Dropped(rf"linear(?!{number}[._])\d.*", _UNUSED),
        (r"fusion\.conv\.weight", "weigh.weight"),
        *within(layer, "", "layer."),
    )


def block(number: int) -> KeyMap:
    return (
        (r"norm(\d)\.body\.(.*)", r"norm\1.\2"),
        *within(prompted(number, TRANSPOSED), r"attn\.", "mixer."),
        *within(prompted(number, GATED), r"ffn\.", "mlp."),
    )


AUTHORS: KeyMap = (
    *(rule for level, number in enumerate((1, 2, 3)) for rule in within(
        block(number), rf"encoder_level{level + 1}\.(\d+)\.", rf"encoder.{level}.\1.")),
    *within(block(7), r"latent\.(\d+)\.", r"encoder.3.\1."),
    *(rule for level, number in enumerate((2, 2, 3)) for rule in within(
        block(number), rf"decoder_level{level + 1}\.(\d+)\.", rf"decoder.{level}.\1.")),
    *within(block(2), r"refinement\.(\d+)\.", r"refine.\1."),
    *((rf"down{level + 1}_{level + 2}\.body\.(.*)", rf"down.{level}.\1") for level in range(3)),
    *((rf"up{level + 2}_{level + 1}\.body\.(.*)", rf"up.{level}.\1") for level in range(3)),
    (r"reduce_chan_level2\.(.*)", r"join.1.\1"),
    (r"reduce_chan_level3\.(.*)", r"join.2.\1"),
    (r"linear1\.(.*)", r"words.0.\1"),
    (r"linear2\.(.*)", r"words.2.\1"),
    (r"patch_embed\.proj\.(.*)", r"stem.\1"),
    (r"output\.(.*)", r"last.\1"),
    Dropped(r"(prompt\d_\d|noise_level|reduce_noise_|chnl_reduce).*", "never called"),
)
