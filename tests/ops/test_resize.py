"""The field's bicubic resize: a slow loop of the same formula, and what any such kernel keeps."""

from __future__ import annotations

from math import ceil, floor

import pytest
import torch

from saccade import SaccadeError
from saccade.ops.resize import resize


def cubic(t: float) -> float:
    t = abs(t)
    if t <= 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def line(values: list[float], scale: float, outputs: int) -> list[float]:
    """One axis, as MATLAB's documentation tells it: counted from 1, mirrored with the edge repeated."""
    mirrored = values + values[::-1]
    narrow = min(scale, 1.0)
    made = []
    for x in range(1, outputs + 1):
        u = x / scale + 0.5 * (1 - 1 / scale)
        reach = range(floor(u - 2 / narrow) - 1, ceil(u + 2 / narrow) + 2)
        weights = [narrow * cubic(narrow * (u - i)) for i in reach]
        total = sum(w * mirrored[(i - 1) % len(mirrored)] for w, i in zip(weights, reach))
        made.append(total / sum(weights))
    return made


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4, 0.7])
@pytest.mark.parametrize("size", [(12, 24), (7, 5), (1, 3)])
def test_equals_a_loop(scale, size):
    image = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    height, width = (ceil(round(side * scale, 6)) for side in size)
    rows = torch.tensor([line(column, scale, height) for column in image.T.tolist()], dtype=torch.float64).T
    slow = torch.tensor([line(row, scale, width) for row in rows.tolist()], dtype=torch.float64)
    torch.testing.assert_close(resize(image[None, None], scale)[0, 0], slow, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4])
def test_constants_everywhere_and_ramps_inside_are_kept(scale):
    constant = torch.full((1, 1, 48, 48), 0.3, dtype=torch.float64)
    torch.testing.assert_close(resize(constant, scale).amax(), constant[0, 0, 0, 0], rtol=0, atol=1e-14)
    torch.testing.assert_close(resize(constant, scale).amin(), constant[0, 0, 0, 0], rtol=0, atol=1e-14)
    rows, columns = torch.meshgrid(*[torch.arange(48, dtype=torch.float64)] * 2, indexing="ij")
    made = resize((2 * rows + 3 * columns)[None, None], scale)[0, 0]
    at = [(torch.arange(n, dtype=torch.float64) + 0.5) / scale - 0.5 for n in made.shape]
    inside = slice(ceil(2 * max(scale, 1)), -ceil(2 * max(scale, 1)))
    expected = 2 * at[0][:, None] + 3 * at[1]
    torch.testing.assert_close(made[inside, inside], expected[inside, inside], rtol=0, atol=1e-11)


def test_known_weights_of_halving():
    """An impulse: the eight taps of MATLAB's imresize(x, 0.5), -3 -9 29 111 111 29 -9 -3 over 256."""
    image = torch.zeros(1, 1, 1, 32, dtype=torch.float64)
    image[..., 15] = 1
    made = resize(image.expand(1, 1, 32, 32), 0.5)[0, 0, 8] * 256
    assert made[5:11].tolist() == pytest.approx([0, -9, 111, 29, -3, 0])


def test_a_scale_of_nothing_is_refused():
    with pytest.raises(SaccadeError, match="scale=0"):
        resize(torch.zeros(1, 1, 2, 2), 0)
