from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from saccade import create_model
from saccade.tools import measure
from saccade.tools.measure import count_macs, peak_memory, race, summary


class Attention(nn.Module):
    """SDPA alone: 2 * B * heads * N * M * d multiply-adds."""

    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        self.grouped = grouped

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)


class Values(nn.Module):
    """Needs the values of its input, so it cannot run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[x[:, 0] > 0])


def test_macs_of_single_operators_by_hand() -> None:
    x = torch.zeros(2, 6, 9, 7)
    assert count_macs(nn.Conv2d(6, 6, 3, padding=1, groups=6), (x,)) == 2 * 6 * 9 * 7 * 9
    assert count_macs(nn.Conv2d(6, 10, 3, stride=2, padding=1, groups=2), (x,)) == 2 * 10 * 5 * 4 * 3 * 9
    assert count_macs(nn.ConvTranspose2d(6, 4, 2, stride=2), (x,)) == 2 * 6 * 9 * 7 * 4 * 4
    assert count_macs(nn.Linear(7, 5), (x,)) == 2 * 6 * 9 * 7 * 5
    assert count_macs(nn.Sequential(nn.LayerNorm(7), nn.GELU(), nn.AvgPool2d(3, 1, 1)), (x,)) == 0


@pytest.mark.parametrize("without_data", [True, False])
def test_macs_of_attention(without_data: bool) -> None:
    count = count_macs if without_data else measure._counted
    q, k = torch.randn(2, 6, 11, 8), torch.randn(2, 6, 5, 8)
    assert count(Attention(), (q, k, k)) == 2 * 2 * 6 * 11 * 5 * 8
    assert count(Attention(grouped=True), (q, k[:, :2], k[:, :2])) == 2 * 2 * 6 * 11 * 5 * 8


@pytest.mark.parametrize("without_data", [True, False])
def test_macs_where_the_counter_alone_is_blind(without_data: bool) -> None:
    count = count_macs if without_data else measure._counted
    lstm = nn.LSTM(5, 7, num_layers=2, bidirectional=True)
    assert count(lstm, (torch.zeros(3, 2, 5),)) == 3 * 2 * 2 * 28 * ((5 + 7) + (14 + 7))
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert count(layer, (torch.zeros(2, 10, 16),)) == 2 * 10 * (4 * 16 * 16 + 2 * 16 * 32 + 2 * 10 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_resnet18() -> None:
    models = pytest.importorskip("torchvision.models")
    assert count_macs(models.resnet18(), (torch.zeros(1, 3, 224, 224),)) == 1814073344


@pytest.mark.parametrize(
    ("name", "macs"), [("vit_tiny_patch16_224", 1253683200), ("swin_tiny_patch4_window7_224", 4490566656)]
)
def test_macs_of_transformers_include_their_attention(name: str, macs: int) -> None:
    timm = pytest.importorskip("timm")
    assert count_macs(timm.create_model(name), (torch.zeros(1, 3, 224, 224),)) == macs


def test_macs_falls_back_to_a_real_run_and_changes_nothing() -> None:
    x = torch.randn(32, 8)
    model = nn.Sequential(nn.BatchNorm1d(8), Values()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = int((model[0].eval()(x)[:, 0] > 0).sum())
    model.train()
    assert count_macs(model, (x,)) == rows * 8 * 4
    assert model.training and model[1].linear.weight.device == x.device
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_macs_passes_the_models_own_error_on() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        count_macs(nn.Linear(3, 4), (torch.zeros(2, 5),))


def test_macs_keeps_shared_weights_and_buffers_apart_from_the_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    twin = measure.without_data(model)
    assert twin[0].weight is twin[1].weight and twin[0].weight.is_meta and not model[0].weight.is_meta


def test_peak_memory_of_known_tensors() -> None:
    x = torch.randn(500, 1000)
    size = x.nbytes
    assert peak_memory(lambda: None) == 0
    assert peak_memory(lambda: x @ x.T) == pytest.approx(500 * 500 * 4, rel=0.05)
    assert peak_memory(lambda: (x + 1) * 2) == pytest.approx(2 * size, rel=0.05)
    assert peak_memory(lambda: (x + 1).mul_(2)) == pytest.approx(size, rel=0.05)
    assert peak_memory(lambda: [(x + 1).sum() for _ in range(5)]) == pytest.approx(size, rel=0.05)
    assert peak_memory(lambda: [x + 1 for _ in range(5)]) == pytest.approx(5 * size, rel=0.05)


def test_peak_memory_counts_what_was_freed_before_the_end() -> None:
    def function() -> Tensor:
        big = torch.empty(300_000)
        del big
        return torch.empty(10)

    assert peak_memory(function) == pytest.approx(1_200_000, rel=0.05)


def test_race_alternates_and_rotates() -> None:
    calls: list[str] = []
    collecting: list[bool] = []
    steps: list[tuple[int, int]] = []

    def call(name: str) -> None:
        calls.append(name)
        collecting.append(gc.isenabled())

    seconds = race(
        {name: lambda name=name: call(name) for name in "ABC"},  # type: ignore[misc]
        rounds=4,
        warmup=1,
        progress=lambda done, rounds: steps.append((done, rounds)),
    )
    assert "".join(calls) == "ABC" + "ABC" + "BCA" + "CAB" + "ABC"
    assert collecting == [True] * 3 + [False] * 12 and gc.isenabled()
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert list(seconds) == ["A", "B", "C"] and all(len(times) == 4 for times in seconds.values())


def test_race_measures_seconds() -> None:
    seconds = race({"sleep": lambda: time.sleep(0.01), "nothing": lambda: None}, rounds=3, warmup=0)
    assert min(seconds["sleep"]) >= 0.01 > min(seconds["nothing"]) >= 0


def test_race_turns_the_collector_on_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        race({"broken": lambda: 1 / 0}, rounds=1, warmup=0)
    assert gc.isenabled()


def test_summary() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": pytest.approx(2.9)}


def test_counted_in_inference_mode_is_what_is_counted_outside() -> None:
    """Also where blocks hand on a parameter, as those with global tokens do."""
    model, image = create_model("dualtoken_vit_nano"), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        inside = count_macs(model, (image,)), count_macs(create_model("dualtoken_vit_nano"), (image,))
    assert inside == (count_macs(model, (image,)),) * 2
