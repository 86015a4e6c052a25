"""The scans: chunks against token by token, gradients too, whatever the length, the chunks and the leading axes."""

from __future__ import annotations

import pytest
import torch

from saccade import record
from saccade.ops import reference, scan
from saccade.ops.scan import counted_states, entering, selective_scan, ssd


def numbers(length, width=5, states=3, batch=2):
    torch.manual_seed(length)
    u, dt = torch.randn(2, batch, length, width, dtype=torch.float64)
    b, c = torch.randn(2, batch, length, states, dtype=torch.float64)
    a = -torch.rand(width, states, dtype=torch.float64) * 4
    return [value.requires_grad_() for value in (u, torch.nn.functional.softplus(dt).detach(), a, b, c)]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 37, 64, 213])
def test_selective_scan_is_the_loop(length):
    arguments = numbers(length)
    ours, wanted = selective_scan(*arguments), reference.selective_scan(*arguments)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(ours)
    for got, want in zip(*(torch.autograd.grad(out, arguments, cotangent) for out in (ours, wanted))):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("together", [1, 100, 1000])
def test_the_number_of_chunks_changes_nothing(monkeypatch, together):
    arguments = numbers(100)
    wanted = selective_scan(*arguments)
    monkeypatch.setattr(scan, "TRACED", 3)
    monkeypatch.setattr(scan, "TOGETHER", together)
    torch.testing.assert_close(selective_scan(*arguments), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_directions_have_rates_of_their_own(monkeypatch, in_blocks):
    u, dt, a, b, c = numbers(40)
    rates = torch.stack([a, a * 2, a * 0.1])
    monkeypatch.setattr(scan, "NARROW", 1)
    with torch.set_grad_enabled(not in_blocks):
        out = selective_scan(*(value[:, None].expand(-1, 3, -1, -1) for value in (u, dt)), rates,
                             *(value[:, None].expand(-1, 3, -1, -1) for value in (b, c)))
    for number in range(3):
        torch.testing.assert_close(out[:, number], reference.selective_scan(u, dt, rates[number], b, c))


@pytest.mark.parametrize("length", [1, 2, 15, 37])
@pytest.mark.parametrize("block", [1, 29, 30, 200, 10**6])  # 15 states an image: image by image, one token, six, all
def test_blocks_of_tokens_are_the_loop(monkeypatch, length, block):
    arguments = [value.detach() for value in numbers(length)]
    calls, one_by_one = [], scan._token_by_token
    monkeypatch.setattr(scan, "NARROW", 1)
    monkeypatch.setattr(scan, "BLOCK", block)
    monkeypatch.setattr(scan, "_token_by_token", lambda *given: calls.append(given) or one_by_one(*given))
    with torch.no_grad():
        ours = selective_scan(*arguments)
    assert len(calls) == (3 if block < 30 else 1)
    torch.testing.assert_close(ours, reference.selective_scan(*arguments), rtol=1e-9, atol=1e-9)


def test_states_are_counted_whatever_computes_them():
    arguments = numbers(40)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), counted_states() as states:
            selective_scan(*arguments)
        assert states == [2 * 40 * 5 * 3]


def test_steps_that_would_overflow_a_product_of_decays():
    """Decays are never divided by: states that vanish within a chunk leave no infinity behind."""
    u, dt, a, b, c = numbers(200)
    arguments = [u.float(), (dt * 50).float(), (a * 20).float(), b.float(), c.float()]
    ours, wanted = selective_scan(*arguments), reference.selective_scan(u, dt * 50, a * 20, b, c)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-3)


def test_half_precision_is_scanned_in_single():
    arguments = [value.detach() for value in numbers(50)]
    half = [value.bfloat16() for value in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        out = selective_scan(*half)
    wanted = reference.selective_scan(*(value.float() for value in half))
    torch.testing.assert_close(out, wanted.bfloat16())  # rounded once, at the end


@pytest.mark.parametrize("length", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_is_the_loop_and_the_scan(length, groups):
    torch.manual_seed(length)
    x = torch.randn(2, length, 4, 3, dtype=torch.float64, requires_grad=True)
    dt = torch.rand(2, length, 4, dtype=torch.float64)
    a = -torch.rand(4, dtype=torch.float64) * 3
    b, c = torch.randn(2, 2, length, groups, 5, dtype=torch.float64)
    out = ssd(x, dt, a, b, c)
    torch.testing.assert_close(out, reference.ssd(x.detach(), dt, a, b, c), rtol=1e-9, atol=1e-9)
    module = torch.nn.Identity()
    with record(torch.nn.Sequential(module)):
        watched = ssd(x, dt, a, b, c)
    torch.testing.assert_close(watched, out, rtol=1e-9, atol=1e-9)
    for got, want in zip(*(torch.autograd.grad(value.square().sum(), [x]) for value in (out, watched))):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_ssd_without_decay_is_causal_linear_attention():
    x = torch.randn(1, 90, 1, 3, dtype=torch.float64)
    b, c = torch.randn(2, 1, 90, 1, 4, dtype=torch.float64)
    out = ssd(x, torch.ones(1, 90, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), b, c)
    wanted = (c[0, :, 0] @ b[0, :, 0].T).tril() @ x[0, :, 0]
    torch.testing.assert_close(out[0, :, 0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_what_enters_a_chunk(count):
    left, decay = torch.rand(2, 2, count, 4, 3, dtype=torch.float64)
    wanted, state = [], torch.zeros(2, 4, 3, dtype=torch.float64)
    for number in range(count):
        wanted.append(state)
        state = decay[:, number] * state + left[:, number]
    torch.testing.assert_close(entering(left, decay, axis=-3), torch.stack(wanted, 1))
