"""What the goldens of pointer networks do not show: padding, stopping, teaching; the problems against brute force."""

from __future__ import annotations

from itertools import permutations
from math import tanh

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, record
from saccade.papers.pointer_network import (
    TASKS,
    PointerAttention,
    PointerNetwork,
    convex_hull,
    delaunay,
    draw,
    shortest_tour,
    tour_length,
)
from tests.contracts.registered import randomised


def test_pointing_in_loops():
    attention = randomised(PointerAttention(3)).double()
    state, encoded = torch.randn(1, 3).double(), torch.randn(1, 4, 3).double()
    closed = torch.tensor([[False, False, True, False]])
    keys, query, v = (layer.weight.tolist() for layer in (attention.key, attention.query, attention.score))

    def times(matrix, x):
        return [sum(a * b for a, b in zip(row, x)) for row in matrix]

    d = times(query, state[0].tolist())
    scores = [sum(w * tanh(a + b) for w, a, b in zip(v[0], times(keys, e), d)) for e in encoded[0].tolist()]
    total = sum(2.718281828459045**score for place, score in enumerate(scores) if place != 2)
    found = attention(state, encoded, closed)[0].exp().tolist()
    assert found == pytest.approx([2.718281828459045**s / total if place != 2 else 0 for place, s in enumerate(scores)])


@pytest.mark.parametrize("stop", [False, True])
def test_padding_is_no_element(stop):
    model = randomised(PointerNetwork(2, 6, 8, stop)).double()
    elements, lengths = torch.rand(3, 7, 2).double(), torch.tensor([4, 7, 5])
    with torch.no_grad():
        scores, chosen = model(elements, lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            alone, place = model(elements[row:row + 1, :length], steps=7)
            open_ = [*range(length), *([7] if stop else [])]
            torch.testing.assert_close(scores[row][:, open_], alone[0])
            assert scores[row][:, length:7].isneginf().all()
            assert torch.equal(chosen[row], torch.where(place[0] == length, 7, place[0]))


def test_teaching_reads_the_right_element():
    """Given its own choices as the target a network says what it says without."""
    model, elements = randomised(PointerNetwork(2, 6, 8)).double(), torch.rand(4, 6, 2).double()
    free = model(elements)
    taught = model(elements, target=free.chosen)
    torch.testing.assert_close(taught.log_scores, free.log_scores)
    other = model(elements, target=(free.chosen + 1) % 6)
    assert torch.equal(other.log_scores[:, 0], free.log_scores[:, 0])
    assert (other.log_scores[:, 1:] - free.log_scores[:, 1:]).abs().amin((1, 2)).max() > 0


def test_a_distinct_answer_is_a_permutation():
    model, elements = randomised(PointerNetwork(2, 6, 8)), torch.rand(5, 6, 2)
    with torch.no_grad():
        chosen = model(elements, distinct=True).chosen
        longer = model(elements, steps=8, distinct=True)
    assert torch.equal(chosen.sort(1).values, torch.arange(6).expand(5, 6)) and not longer.log_scores.isnan().any()


def test_where_it_points_is_recorded():
    model = randomised(PointerNetwork(2, 6, 8))
    with torch.no_grad(), record(model) as r:
        scores = model(torch.rand(2, 5, 2)).log_scores
    seen = torch.cat([part.weights[:, 0] for part in r["attention"].parts], 1)
    torch.testing.assert_close(seen, scores.exp())


def crosses(points, hull):
    """Whether each of the points lies to the left of, or on, every side of the hull."""
    sides = [(points[a], points[b]) for a, b in zip(hull, hull[1:] + hull[:1])]
    return all(float((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])) >= -1e-9
               for a, b in sides for p in points)


@pytest.mark.parametrize("count", [3, 5, 20])
def test_the_hull_holds_all_points(count):
    from scipy.spatial import ConvexHull

    for _ in range(10):
        points = torch.rand(count, 2, dtype=torch.float64)
        hull = convex_hull(points)
        assert crosses(points, hull) and hull[0] == min(hull)
        assert set(hull) == set(ConvexHull(points.numpy()).vertices.tolist())


def test_hulls_of_little():
    assert convex_hull(torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]])) == [0, 1, 2, 3]
    assert convex_hull(torch.tensor([[2.0, 0], [0, 0], [1, 0]])) == [0, 1]


def test_no_circle_of_the_triangulation_holds_a_point():
    points = torch.rand(12, 2, dtype=torch.float64)
    triangles = torch.tensor(delaunay(points)).view(-1, 3)
    assert bool((triangles.diff(dim=1) > 0).all()) and len({*map(tuple, triangles.tolist())}) == len(triangles)
    assert len(triangles) == 2 * 12 - 2 - len(convex_hull(points))  # Euler
    incentres = []
    for triangle in triangles:
        corners = points[triangle]
        centre = torch.linalg.solve(2 * (corners[1:] - corners[0]),
                                    corners[1:].square().sum(1) - corners[0].square().sum())
        radius = (corners[0] - centre).norm()
        assert bool(((points - centre).norm(dim=1) >= radius - 1e-9).all())
        sides = (corners.roll(-1, 0) - corners.roll(1, 0)).norm(dim=1)
        incentres.append(tuple(((sides[:, None] * corners).sum(0) / sides.sum()).tolist()))
    assert incentres == sorted(incentres)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_the_shortest_of_all_tours(count):
    for _ in range(5):
        points = torch.rand(count, 2, dtype=torch.float64)
        tour = shortest_tour(points)
        all_tours = torch.tensor([[0, *rest] for rest in permutations(range(1, count))])
        lengths = tour_length(points.expand(len(all_tours), -1, -1), all_tours)
        assert sorted(tour) == list(range(count)) and tour[0] == 0 and tour[1] <= tour[-1]
        torch.testing.assert_close(tour_length(points, torch.tensor(tour)), lengths.min())


@pytest.mark.parametrize("task", TASKS)
def test_drawn_answers_end_in_the_stop(task):
    elements, answers = draw(task, 6, 5, torch.Generator().manual_seed(0))
    again, _ = draw(task, 6, 5, torch.Generator().manual_seed(0))
    assert torch.equal(elements, again) and elements.shape == (6, 5, 2)
    for one, answer in zip(elements, answers.tolist()):
        end = answer.index(5)
        assert answer[:end] == TASKS[task](one) and set(answer[end + 1:]) <= {-1}
    model = PointerNetwork(2, 4, 4, stop=True)
    loss = F.nll_loss(model(elements, target=answers).log_scores.mT, answers, ignore_index=-1)
    loss.backward()
    assert loss.isfinite() and all(value.grad.abs().max() > 0 for value in model.parameters())


def test_it_learns_to_sort():
    torch.manual_seed(0)
    model = PointerNetwork(1, 16, 32)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(200):
        numbers = torch.rand(128, 5, 1)
        order = numbers[..., 0].argsort(1)
        loss = F.nll_loss(model(numbers, order).log_scores.mT, order)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        numbers = torch.rand(1000, 5, 1)
        assert (model(numbers).chosen == numbers[..., 0].argsort(1)).all(1).float().mean() > 0.7


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="convex_hull, delaunay, tsp"):
        draw("hull", 1, 5)
    with pytest.raises(SaccadeError, match="points=2"):
        draw("tsp", 1, 2)
    with pytest.raises(SaccadeError, match="2 to 16"):
        shortest_tour(torch.rand(17, 2))
