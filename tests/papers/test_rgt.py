"""RGT: folding beside its definition, windows that lie and stand, any picture."""

from __future__ import annotations

import pytest
import torch

from saccade import Site
from saccade.papers import rgt as paper
from saccade.papers.rgt import RectangleWindow, RecursiveGeneralization, SpatiallyGatedMlp, rgt
from saccade.parts import window as windows
from saccade.tools.measure import peak_memory
from tests.contracts.registered import randomised


@pytest.mark.parametrize("side, evaluation, training", [(63, 2, 1), (64, 2, 2), (256, 2, 3), (1024, 3, 4)])
def test_folds_as_the_side_asks(side, evaluation, training):
    mixer = RecursiveGeneralization(Site(8, 2))
    assert mixer.times((5, side)) == evaluation
    assert mixer.times((side, 3), training=True) == training


def test_folding_leaves_out_what_fills_no_window():
    mixer = randomised(RecursiveGeneralization(Site(8, 2))).double().eval()
    x = torch.randn(1, 35, 33, 8, dtype=torch.float64)
    moved = x.clone()
    moved[:, 32:] += 1
    torch.testing.assert_close(mixer(moved)[:, :32], mixer(x)[:, :32])
    moved = x.clone()
    moved[:, 0, 0] += 1
    assert (mixer(moved)[0, 31, 31] - mixer(x)[0, 31, 31]).abs().max() > 1e-6


def test_halves_see_lying_and_standing_windows():
    mixer = randomised(RectangleWindow(Site(16, 4), window=(2, 4), shift=False)).double().eval()
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(16))
        mixer.position.weight.zero_()
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64)
    moved = x.clone()
    moved[0, 0, 3] += 1
    change = (mixer(moved) - mixer(x))[0].abs()
    lying, standing = change[..., :8].amax(-1) > 1e-9, change[..., 8:].amax(-1) > 1e-9
    assert lying.nonzero().amax(0).tolist() == [1, 3] and int(lying.sum()) == 8
    assert standing.nonzero().amin(0).tolist() == [0, 2] and standing.nonzero().amax(0).tolist() == [3, 3]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("numbers", [1, 3 * 2 * 8**2, 10**9])  # a window, three windows, all
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_windows_in_parts_as_at_once(monkeypatch, shift, numbers, qkv_bias):
    mixer = randomised(RectangleWindow(Site(16, 4), window=(2, 4), shift=shift, qkv_bias=qkv_bias)).double().eval()
    x, parts = torch.randn(2, 8, 12, 16, dtype=torch.float64), []
    monkeypatch.setattr(windows, "LAID", numbers)
    monkeypatch.setattr(RectangleWindow, "_in_parts", lambda self, x, run=RectangleWindow._in_parts: parts.append(x) or
                        run(self, x))
    expected = mixer(x)  # with a gradient: at once
    assert expected.requires_grad and not parts
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), expected.detach())
        assert len(parts) == 1
        mixer(x[:, :7])  # no whole windows
        assert len(parts) == 1


def test_gates_in_parts_as_at_once(monkeypatch):
    mlp, x = randomised(SpatiallyGatedMlp(8)).double(), torch.randn(2, 5, 7, 8, dtype=torch.float64)
    expected = mlp(x)
    monkeypatch.setattr(paper, "PIECE", 16)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected.detach())


def test_parts_of_other_layouts_and_types(monkeypatch):
    """A map that lies otherwise in memory, and autocast, whose products have another type than the map."""
    monkeypatch.setattr(paper, "PIECE", 16)
    lying = torch.randn(2, 16, 8, 12).permute(0, 2, 3, 1)
    for module in (RectangleWindow(Site(16, 4), window=(2, 4), shift=True), SpatiallyGatedMlp(16)):
        expected = randomised(module)(lying.contiguous()).detach()
        with torch.no_grad():
            torch.testing.assert_close(module(lying), expected)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(module(lying).float(), expected, rtol=0.05, atol=0.05 * expected.abs().max())


def test_parts_take_less_memory(monkeypatch):
    """No map of queries, keys and values of all tokens, nor of both halves of the hidden state."""
    site, x = Site(32, 2), torch.randn(1, 64, 64, 32)
    monkeypatch.setattr(windows, "LAID", 256**2)  # of one window
    for module, maps in ((RectangleWindow(site, window=(8, 32)), 6), (SpatiallyGatedMlp(32), 5)):
        peaks = {}
        for gradient in (True, False):  # at once, in parts
            with torch.set_grad_enabled(gradient):
                module(x)  # its tables are kept
                peaks[gradient] = peak_memory(lambda: module(x))  # noqa: B023
        assert peaks[False] < maps * 4 * x.numel() < peaks[True]


def test_a_bias_of_one_number_is_the_same_for_every_offset():
    """What the golden of local attention with 48 channels has for a gradient is rounding: ours is zero in float64."""
    mixer = randomised(RectangleWindow(Site(48, 4), window=(4, 8), shift=True)).double()
    mixer(torch.randn(1, 14, 19, 48, dtype=torch.float64)).square().sum().backward()
    assert mixer.bias[0].mlp[9].weight.grad.abs().max() < 1e-9 * mixer.qkv.weight.grad.abs().max()


def test_any_size():
    torch.manual_seed(0)
    model = randomised(rgt(2, (2,), dim=16, heads=2, window=(2, 4))).eval()
    with torch.no_grad():
        for size in [(8, 12), (7, 19), (1, 5)]:
            image = torch.rand(2, 3, *size)
            out = model(image)
            assert out.shape == (2, 3, 2 * size[0], 2 * size[1]) and out.isfinite().all()
            torch.testing.assert_close(torch.cat([model(one[None]) for one in image]), out)


def test_published_parameters():
    with torch.device("meta"):
        for name, groups, million in (("small", 6, 10.20), ("whole", 8, 13.37)):
            count = sum(weight.numel() for weight in rgt(4, (6,) * groups).parameters()) / 1e6
            assert count == pytest.approx(million, rel=0.01), name
