"""Which path runs where, and who says so."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from saccade import SaccadeError, record
from saccade.ops import choice, explain_choice, neighborhood, prefer
from saccade.ops.choice import Case, Choice, choose
from saccade.ops.neighborhood import neighborhood_attention

HALF = Case("neighborhood", "cuda", torch.bfloat16, (56, 56), 4, 32, 8, False, True, "kernel 7, dilation 1")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and NATTEN, as far as choices can tell."""
    monkeypatch.setattr(choice, "_gpu_lacks", lambda dtype: "")
    monkeypatch.setattr(choice, "natten", SimpleNamespace(na2d=len, HAS_LIBNATTEN=True))
    choice._natten_lacks.cache_clear()
    choice._choose.cache_clear()
    yield
    choice._natten_lacks.cache_clear()
    choice._choose.cache_clear()


@pytest.mark.parametrize(("change", "path"), [
    ({}, "natten"),
    ({"bias": True, "training": False}, "flex"),
    ({"bias": True}, "eager"),  # its gradient
    ({"dtype": torch.float32}, "flex"),
    ({"dtype": torch.float64}, "eager"),
    ({"head_dim": 20}, "flex"),
    ({"head_dim": 12}, "eager"),
    ({"batch": 0}, "eager"),
    ({"kernel": (3, 1)}, "flex"),
    ({"dtype": torch.float32, "grid": (11, 11)}, "eager"),
    ({"device": "mps", "dtype": torch.float16}, "eager"),
    ({"device": "cpu", "training": False}, "eager"),
    ({"op": "pattern"}, "flex"),
    ({"op": "pattern", "bias": True}, "flex"),
    ({"op": "pattern", "device": "cpu"}, "eager"),
])
def test_the_table(change: dict[str, Any], path: str, gpu: None) -> None:
    assert choose(HALF._replace(**change)).path == path


def test_what_the_machine_lacks(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "natten", SimpleNamespace(na2d=len, HAS_LIBNATTEN=False))
    assert choose(HALF).path == "flex"
    monkeypatch.setattr(choice, "_gpu_lacks", lambda dtype: "triton is not installed")
    choice._choose.cache_clear()
    assert choose(HALF).path == "eager"


def test_explanation_names_each_path_and_its_reason(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = dict(grid=(56, 56), heads=4, head_dim=32, kernel=7, dilation=1, device="cuda")
    text = explain_choice("neighborhood", **how, batch=3, dtype=torch.float32, bias=True, training=True)
    first, *lines = text.splitlines()
    assert first == ("neighborhood attention, training: batch 3, 56x56, 4 heads x 32, kernel 7, dilation 1, bias, "
                     "float32 on cuda")
    words = {line[3:].split()[0]: line[3:].split(maxsplit=2)[1:] for line in lines}
    assert {path: verdict for path, (verdict, _) in words.items()} == {
        "natten": "no", "flex": "can", "eager": "yes", "reference": "no"}
    assert words["flex"][1].endswith(": sums the gradient of a bias by atomic adds")
    assert words["reference"][1] == "loops in float64: has no gradient"
    assert [line[:2] for line in lines] == ["  ", "  ", "->", "  "]
    assert "-> natten    yes" in explain_choice("neighborhood", **how, dtype=torch.float16)
    with pytest.raises(SaccadeError, match="no op 'neighbourhood' with a choice; did you mean neighborhood"):
        explain_choice("neighbourhood", **how)


def test_on_this_machine() -> None:
    text = explain_choice("neighborhood", grid=(56, 56), heads=4, head_dim=32)
    assert "-> eager     yes" in text and "NVIDIA" in text and "compiles for a third of a minute" in text


def attention(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return neighborhood_attention(x, x, x, 3, 1, bias)


def test_what_cannot_run_is_one_clear_line() -> None:
    x = torch.randn(1, 6, 5, 2, 4, requires_grad=True)
    with prefer("flex"), pytest.raises(SaccadeError, match="prefer.'flex'.: .*6x5.*: has no gradient on a CPU"):
        attention(x)
    with prefer("natten"), pytest.raises(SaccadeError, match="for NVIDIA GPUs"):
        attention(x.detach())
    with prefer("reference"), pytest.raises(SaccadeError, match="has no gradient"):
        attention(x)
    with prefer("flex"), pytest.raises(SaccadeError, match="for bfloat16, float16 and float32"):
        attention(x.detach().double())
    with pytest.raises(SaccadeError, match="no path 'flax'; did you mean flex"), prefer("flax"):
        pass
    with prefer("reference"), pytest.raises(SaccadeError, match="pattern attention has the paths flex, eager"):
        choose(HALF._replace(op="pattern"))


def test_natten_is_asked_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is ours; the names of its arguments are those of natten.na1d, na2d, na3d since 0.20."""
    asked: list[dict[str, Any]] = []

    def na2d(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        asked.append(how)
        return value + query.shape[-1]

    monkeypatch.setattr(neighborhood, "natten", SimpleNamespace(na1d=None, na2d=na2d, na3d=None))
    monkeypatch.setattr(neighborhood, "choose", lambda case: Choice("natten", ""))
    x = torch.randn(1, 6, 9, 2, 4)
    with prefer("natten"):
        out = neighborhood_attention(x, x, x, (2, 3), (1, 3), stride=(2, 1), causal=(True, False), scale=0.3)
    assert torch.equal(out, x + 4)
    assert asked == [dict(kernel_size=(2, 3), stride=(2, 1), dilation=(1, 3), is_causal=(True, False), scale=0.3)]


def test_preferring_ends_with_its_block() -> None:
    x = torch.randn(1, 6, 5, 2, 4, dtype=torch.float64)
    expected = attention(x)
    with prefer("reference"):
        slow = attention(x)
        with prefer("eager"):
            assert torch.equal(attention(x), expected)
    torch.testing.assert_close(slow, expected, rtol=0, atol=1e-12)
    assert not torch.equal(slow, expected) and torch.equal(attention(x), expected)


def test_what_watches_or_compiles_sees_the_eager_path() -> None:
    class Mixer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attention(x)

    model, x = torch.nn.Sequential(Mixer()), torch.randn(1, 6, 5, 2, 4, requires_grad=True)
    expected = model(x)
    with prefer("natten"):  # which would raise
        with record(model) as r:
            torch.testing.assert_close(model(x), expected)
        assert r["0"].parts
        with FlopCounterMode(display=False):
            assert torch.equal(model(x), expected)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        torch.export.export(model, (x,))


def test_one_line_a_distinct_case(caplog: pytest.LogCaptureFixture) -> None:
    choice._say.cache_clear()
    x = torch.randn(1, 6, 5, 2, 4)
    attention(x)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="saccade.ops"):
        attention(x)
        attention(x)
        attention(torch.randn(1, 7, 5, 2, 4))
        with prefer("reference"):
            attention(x)
    lines = [line.getMessage() for line in caplog.records if line.name == "saccade.ops"]
    assert len(lines) == 3
    assert lines[0] == ("neighborhood attention: batch 1, 6x5, 2 heads x 4, kernel (3, 3), dilation (1, 1), float32 on "
                        "cpu: eager (tiles of near queries, one fused call for all)")
    assert lines[2].endswith("reference (preferred: loops in float64)")
