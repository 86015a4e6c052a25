"""Pointer networks: attention that chooses, so that the answer to a question about n things is a list of those things.

An encoder reads the elements, e_j; a decoder, at each step, points at one of them by its attention to all,
    p(C_i = j) = softmax_j v . tanh(W1 e_j + W2 d_i),
and reads the element that was pointed at before it points again. There is no dictionary of outputs whose size would
have to be known: a network that has seen hulls of 5 to 50 points draws hulls of 500.

Vinyals, Fortunato, Jaitly, "Pointer Networks", 2015; the problems of section 3 are `draw`n here with their answers.

Any number of elements, up to `lengths` of them in each row. With `stop` there is one place more to point at, after the
last element, which ends an answer; what is pointed at after it means nothing.
Quirks kept: the encoder reads both ways and its directions are summed (the paper's reads forwards: `bidirectional`
False); the decoder starts from the forward one, and from a zero input.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within
from saccade.core.names import closest
from saccade.core.optional import optional
from saccade.core.record import note_rows, recording

spatial = optional("scipy.spatial", "train")

CARD = Card(
    "Pointer Networks",
    authors="Vinyals, Fortunato, Jaitly",
    year=2015,
    systems=("pointer_network",),
    arxiv="1506.03134",
    code="ast0414/pointer-networks-pytorch@27aec4e (a port; the authors published none)",
    licence="MIT",
    read="abstract, code",
    keywords="Ptr-Net, additive attention, sequence to sequence, convex hull, Delaunay triangulation, travelling "
             "salesman, combinatorial optimization",
    kinds=("sequence",),
    goldens=("pointer_net_h32", "op_pointer_attention"),
    tests=("tests/papers/test_pointer_network.py",),
)


class PointerAttention(nn.Module):
    """log softmax_j v . tanh(W1 e_j + W2 d): decoder state (B, C), encoded elements (B, N, C) -> (B, N). (Equation 3.)

    `closed` (B, N) bool are places that must not be pointed at: -inf. `keys` are W1 e, which all steps share.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(dim, dim, bias=False)
        self.query = nn.Linear(dim, dim, bias=False)
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(
        self, state: Tensor, encoded: Tensor, closed: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        keys = self.key(encoded) if keys is None else keys
        scores = self.score((keys + self.query(state)[:, None]).tanh())[..., 0]
        if closed is not None:
            scores = scores.masked_fill(closed, -torch.inf)
        if recording():
            note_rows(scores.softmax(-1))
        return scores.log_softmax(-1)


class Pointing(NamedTuple):
    """log_scores (B, M, N), of each step and place, and the place `chosen` at each step, (B, M)."""

    log_scores: Tensor
    chosen: Tensor


class PointerNetwork(nn.Module):
    """Elements (B, N, D) -> where M steps point, of N places (N + 1 with `stop`, the last of which ends the answer).

    In training give the answers as `target` (B, M), -1 after their end: each step then reads the right element, and
    `F.nll_loss(log_scores.mT, target, ignore_index=-1)` is the paper's loss. Otherwise it reads what it points at, for
    `steps` (N) steps; `distinct` closes what was chosen already, as in a tour.
    """

    def __init__(
        self, in_dim: int = 2, dim: int = 256, hidden: int = 512, stop: bool = False, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(in_dim, dim, bias=False)
        self.encoder = nn.LSTM(dim, hidden, batch_first=True, bidirectional=bidirectional)
        self.decoder = nn.LSTMCell(hidden, hidden)
        self.attention = PointerAttention(hidden)
        self.end = nn.Parameter(torch.randn(hidden) * 0.08) if stop else None

    def forward(
        self, elements: Tensor, target: Tensor | None = None, lengths: Tensor | None = None, steps: int | None = None,
        distinct: bool = False,
    ) -> Pointing:
        encoded, state = self.encode(elements, lengths)
        count, places = elements.shape[1], encoded.shape[1]
        rows = torch.arange(len(elements), device=elements.device)
        closed = torch.zeros(len(elements), places, dtype=torch.bool, device=elements.device)
        if lengths is not None:
            numbers = torch.arange(places, device=elements.device)
            closed = (numbers >= lengths[:, None]) & (numbers < count)
        keys, given = self.attention.key(encoded), torch.zeros_like(state[0])
        scores, chosen = [], []
        for step in range(target.shape[1] if target is not None else steps or count):
            state = self.decoder(given, state)
            scores.append(self.attention(state[0], encoded, closed, keys))
            chosen.append(scores[-1].argmax(-1))
            read = chosen[-1] if target is None else target[:, step].clamp(min=0)
            given = encoded[rows, read]
            if distinct and target is None:
                closed = closed.scatter(1, read[:, None], True)
                closed = closed & ~closed.all(1, keepdim=True)  # all have been chosen: what follows means nothing
        return Pointing(torch.stack(scores, 1), torch.stack(chosen, 1))

    def encode(self, elements: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The encoded places (B, N or N + 1, C), and hidden and cell state of the forward direction, (B, C)."""
        x = self.embedding(elements)
        if lengths is None:
            encoded, (hidden, cell) = self.encoder(x)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            packed, (hidden, cell) = self.encoder(packed)
            encoded = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]
        encoded = encoded.unflatten(-1, (-1, self.encoder.hidden_size)).sum(-2)
        if self.end is not None:
            encoded = torch.cat([encoded, self.end.expand(len(encoded), 1, -1)], 1)
        return encoded, (hidden[0], cell[0])


def convex_hull(points: Tensor) -> list[int]:
    """Numbers of the corners of the hull of (N, 2), counterclockwise, from the lowest number on. (Section 3.1.)"""
    x, y = points.double().T.tolist()

    def turn(a: int, b: int, c: int) -> float:
        return (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a])

    order, hull = sorted(range(len(x)), key=lambda point: (x[point], y[point])), list[int]()
    for way in (order, order[::-1]):  # the lower hull, and the upper one back
        side = list[int]()
        for point in way:
            while len(side) > 1 and turn(side[-2], side[-1], point) <= 0:
                side.pop()
            side.append(point)
        hull += side[:-1]
    first = hull.index(min(hull))
    return hull[first:] + hull[:first]


def delaunay(points: Tensor) -> list[int]:
    """The triangles of the Delaunay triangulation of (N, 2), three numbers each, rising; ordered by their incentres.

    (Section 3.2: without an order of the triangles and in them, nothing is learned.)
    """
    places = points.double().numpy()
    triangles = np.sort(spatial.Delaunay(places).simplices, axis=1)
    corners = places[triangles]  # (T, 3, 2)
    opposite = np.linalg.norm(np.roll(corners, -1, 1) - np.roll(corners, 1, 1), axis=-1)
    incentres = (corners * opposite[..., None]).sum(1) / opposite.sum(1, keepdims=True)
    return [int(number) for number in triangles[np.lexsort(incentres.T[::-1])].flatten()]


def shortest_tour(points: Tensor) -> list[int]:
    """The shortest closed tour of (N, 2), from 0 on: exact, by dynamic programming in 2^N N^2 steps. (Section 3.3.)

    Of its two directions the one whose second number is lower. Raises SaccadeError beyond 16 points.

    Held and Karp, 1962: of the ways from 0 through a set of others to its member j, only the shortest matters,
    D(S, j) = min over i in S - j of D(S - j, i) + d_ij.
    """
    count = len(points)
    if not 1 < count <= 16:
        raise SaccadeError(f"the exact tour of {count} points: give 2 to 16, for each point more takes twice the time")
    distance = torch.cdist(points.double(), points.double()).tolist()
    ways = {(1 << j, j): (distance[0][j], 0) for j in range(1, count)}
    for size in range(2, count):
        for members in combinations(range(1, count), size):
            seen = sum(1 << j for j in members)
            for j in members:
                ways[seen, j] = min((ways[seen ^ 1 << j, i][0] + distance[i][j], i) for i in members if i != j)
    seen = 2**count - 2
    tour = [min(range(1, count), key=lambda j: ways[seen, j][0] + distance[j][0])]
    while tour[-1]:
        seen, before = seen ^ 1 << tour[-1], ways[seen, tour[-1]][1]
        tour.append(before)
    tour.reverse()
    return tour if tour[1] <= tour[-1] else [0, *tour[:0:-1]]  # both ways round are as long


def tour_length(points: Tensor, tour: Tensor) -> Tensor:
    """Length of closed tours (..., M) of points (..., N, 2)."""
    stops = points.gather(-2, tour[..., None].expand(*tour.shape, 2))
    return torch.linalg.vector_norm(stops - stops.roll(1, -2), dim=-1).sum(-1)


TASKS = {"convex_hull": convex_hull, "delaunay": delaunay, "tsp": shortest_tour}


def draw(task: str, count: int, points: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """`count` problems of a task, uniform in the unit square: elements (B, N, 2) and answers (B, M) for training.

    An answer ends with N, the place of `stop`; -1 stands after it. Tasks are "convex_hull", "delaunay" and "tsp", of
    3 points or more ("tsp" of at most 16): else SaccadeError.
    """
    if task not in TASKS:
        raise SaccadeError(f"task={task!r}: choose one of {', '.join(TASKS)}{closest(task, TASKS)}")
    if points < 3:
        raise SaccadeError(f"points={points}: a hull, a triangle or a tour has 3 or more")
    elements = torch.rand(count, points, 2, generator=generator)
    answers = [torch.tensor([*TASKS[task](one), points]) for one in elements]
    return elements, nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1)


ATTENTION: KeyMap = ((r"W1\.(.*)", r"key.\1"), (r"W2\.(.*)", r"query.\1"), (r"vt\.(.*)", r"score.\1"))
AUTHORS: KeyMap = (
    *within(ATTENTION, r"attn\.", "attention."),
    (r"encoder\.rnn\.(.*)", r"encoder.\1"),
    (r"decoding_rnn\.(.*)", r"decoder.\1"),
)
