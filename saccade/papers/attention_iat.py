"""Attention AT: training against the worst small change of the attention scores.

Where a network looks should not turn on a hair. In training its attention scores a are moved, a row at a time, by the
step of length eps that raises the loss most, to first order, and the loss there is added,
    L(a) + lambda L(a + r),   r = eps g / |g|_2,   g = dL / da.
It works on whatever `record` sees: the attention over the words of a sentence as in the paper, every head of a vision
transformer, a model of others. Weights w = softmax(a) are moved as w e^r over its sum, so no module is changed, and the
clean pass gives g as well: two passes, where the paper's code takes three.

Attention iAT lets the scores of a sentence move only along their normalised differences d_t = (a_t - a_k)_k: r_t =
sum_k w_tk d_tk, w = eps dL/dw / |dL/dw|_2. As written that is AT's step: dL/dw_tk = g_t d_tk with |d_t| = 1, hence
r_t = eps g_t / |g|, but in a row whose scores are all equal, which stays. The released code, in turn, forms differences
across the sentences of a batch, loses them on the way, and steps by -eps g / |g|: towards the lower loss.

Kitada, Iyatomi, "Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training", 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.names import closest
from saccade.core.record import note_rows, record

CARD = Card(
    "Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training",
    authors="Kitada, Iyatomi",
    year=2021,
    systems=("attention_iat",),
    arxiv="2009.12064",
    code="shunk031/attention-meets-perturbation@d40a5ca",
    licence="MIT",
    read="abstract, fact sheet, code",
    keywords="adversarial training, interpretable adversarial training, attention perturbation, word importance, "
             "robustness, regularization",
    kinds=("training",),
    goldens=("op_attention_at_bc", "op_attention_iat_bc"),
    tests=("tests/papers/test_attention_iat.py",),
)


def steepest(weights: Tensor, slopes: Tensor) -> Tensor:
    """g / |g| of each row (AT); 0 where nothing moves the loss."""
    return F.normalize(slopes, dim=-1)


def along_differences(weights: Tensor, slopes: Tensor) -> Tensor:
    """The same, but 0 in rows all of whose scores are equal, where no difference points anywhere (iAT of the paper)."""
    seen = weights > 0
    largest, least = weights.amax(-1, keepdim=True), weights.masked_fill(~seen, torch.inf).amin(-1, keepdim=True)
    return steepest(weights, slopes) * (largest > least)


def released(weights: Tensor, slopes: Tensor) -> Tensor:
    """-g / |g|: the iAT of the released code."""
    return -steepest(weights, slopes)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "at": steepest, "iat": along_differences, "released_iat": released,
}


def moved(weights: Tensor, by: Tensor) -> Tensor:
    """softmax(a + r) from softmax(a) and r, both (..., N): what had no weight gets none."""
    tilted = weights * (by - by.detach().amax(-1, keepdim=True)).exp()
    total = tilted.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return tilted * (weights.sum(-1, keepdim=True) / total)


class Adversarial(NamedTuple):
    """The loss to train with, clean + lambda adversarial, its two parts, and dL/da of each softmax, by module."""

    total: Tensor
    clean: Tensor
    adversarial: Tensor
    slopes: dict[str, list[Tensor]]


def adversarial_loss(
    model: nn.Module, loss: Callable[[], Tensor], size: float = 1.0, weight: float = 1.0, form: str = "at",
    layers: str = "*",
) -> Adversarial:
    """`loss()`, which runs `model`, clean and with moved attention scores; differentiable, both with the same dropout.

        found = adversarial_loss(model, lambda: F.cross_entropy(model(images), labels), size=0.5)
        found.total.backward()

    Each softmax row of the modules that the pattern `layers` names is moved by a vector of length `size`, a constant
    of the second pass; `form` is one of FORMS. Raises SaccadeError where no such module computes softmax weights.
    """
    if form not in FORMS:
        raise SaccadeError(f"form={form!r}: choose one of {', '.join(FORMS)}{closest(form, FORMS)}")
    still: list[tuple[str, Tensor, Tensor]] = []

    def at_zero(name: str, weights: Tensor) -> Tensor:
        by = torch.zeros_like(weights, requires_grad=True)
        still.append((name, weights.detach(), by))
        return moved(weights, by)

    with torch.enable_grad(), same_draws_again(model), record(model, layers, change=at_zero):
        clean = loss()
    if not still:
        raise SaccadeError(f"no softmax weights in the modules {layers!r} of {type(model).__name__}: nothing to move")
    found = torch.autograd.grad(clean, [by for _, _, by in still], retain_graph=True, allow_unused=True,
                                materialize_grads=True)
    steps: list[tuple[str, Tensor]] = []
    slopes: dict[str, list[Tensor]] = {}
    for (name, weights, _), slope in zip(still, found, strict=True):
        steps.append((name, size * FORMS[form](weights, slope)))
        slopes.setdefault(name, []).append(slope)

    def pushed(name: str, weights: Tensor) -> Tensor:
        expected, by = steps.pop(0)
        if expected != name or by.shape != weights.shape:
            raise SaccadeError(f"the second pass computes other weights ({name} {tuple(weights.shape)}) than the first "
                               f"({expected} {tuple(by.shape)}): the loss must run the model on the same batch")
        return moved(weights, by)

    with record(model, layers, change=pushed):
        adversarial = loss()
    return Adversarial(clean + weight * adversarial, clean, adversarial, slopes)


def same_draws_again(model: nn.Module) -> AbstractContextManager[None]:
    """A block whose random draws come again after it, on the CPU and the model's GPUs."""
    return torch.random.fork_rng(sorted({value.device.index for value in model.parameters() if value.is_cuda}))


class WordAttention(nn.Module):
    """softmax_t v . tanh(W h_t + b), with a question W h_t + b + U q + c: (B, L, C), valid (B, L) -> (B, L)."""

    def __init__(self, dim: int, asked: bool = False) -> None:
        super().__init__()
        self.word = nn.Linear(dim, dim // 2)
        self.question = nn.Linear(dim, dim // 2) if asked else None
        self.score = nn.Linear(dim // 2, 1, bias=False)

    def forward(self, words: Tensor, valid: Tensor | None = None, question: Tensor | None = None) -> Tensor:
        hidden = self.word(words)
        if self.question is not None and question is not None:
            hidden = hidden + self.question(question)[:, None]
        scores = self.score(hidden.tanh())[..., 0]
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        return note_rows(scores.softmax(-1))


class AttentiveReader(nn.Module):
    """Class scores (B, classes) of sentences (B, L) of word numbers, 0 for padding: the paper's network.

    Embeddings, an LSTM both ways, `WordAttention` over its states, a linear layer; `asked` reads a `question` (B, M) of
    the same words by an LSTM of its own, whose last states are q. One class is a yes or no.
    """

    def __init__(
        self, vocabulary: int, classes: int = 1, dim: int = 300, hidden: int = 128, asked: bool = False
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.reader = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.listener = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True) if asked else None
        self.attention = WordAttention(2 * hidden, asked)
        self.out = nn.Linear(2 * hidden, classes)

    def forward(self, sentence: Tensor, question: Tensor | None = None) -> Tensor:
        states, _ = read(self.reader, self.words(sentence), sentence != 0)
        asked = None
        if self.listener is not None:
            if question is None:
                raise SaccadeError("this reader was built with asked=True: give a question beside the sentence")
            asked = read(self.listener, self.words(question), question != 0)[1]
        weights = self.attention(states, sentence != 0, asked)
        return self.out((weights[:, None] @ states)[:, 0])


def read(lstm: nn.LSTM, words: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """All states (B, L, 2 C) and the last of both ways (B, 2 C); sentences are `valid` (B, L) from their start on."""
    if not bool(valid[:, 0].all()):
        raise SaccadeError(f"sentence {int((~valid[:, 0]).nonzero()[0])} begins with 0, which is padding: words first, "
                           "at least one")
    packed = pack_padded_sequence(words, valid.sum(1).cpu(), batch_first=True, enforce_sorted=False)
    states, (last, _) = lstm(packed)
    return pad_packed_sequence(states, batch_first=True, total_length=words.shape[1])[0], torch.cat([*last], -1)


def agreement(attention: Tensor, importance: Tensor, valid: Tensor | None = None) -> Tensor:
    """Pearson's correlation of attention with the importance of words in each sentence, all (B, L) -> (B,).

    The paper's importance is the length of the loss's slope at each word's embedding,
    `torch.autograd.grad(loss, embedded)[0].norm(dim=-1)`. 0 where one of both is constant.
    """
    valid = torch.ones_like(attention, dtype=torch.bool) if valid is None else valid
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    a, b = ((x - (x * valid).sum(-1, keepdim=True) / count) * valid for x in (attention, importance))
    return F.cosine_similarity(a, b, dim=-1)


AUTHORS: KeyMap = (
    (r"attention\.attn\.0\.(.*)", r"attention.word.\1"),
    (r"attention\.attn\.2\.(.*)", r"attention.score.\1"),
    (r"attention\.attn1p\.(.*)", r"attention.word.\1"),
    (r"attention\.attn1q\.(.*)", r"attention.question.\1"),
    (r"attention\.attn2\.(.*)", r"attention.score.\1"),
)
