"""Networks of a contest in onnxruntime: checked, in int8 too, and who decides which latency counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from saccade.core.errors import SaccadeError
from saccade.tools import export as room
from saccade.tools import graphs
from saccade.tools.export import checked, export_square, open_session, quantize
from saccade.tools.graphs import Graphs, latency_of
from saccade.tools.measure import INT8, ONNX


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(64, 5)).eval()


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graphs") / "model.onnx"
    found = export_square(network, file, torch.randn(6, 3, 16, 16))
    assert found.pictures == found.agree == 6 and found.scores < 1e-5
    return file


def test_batches_of_any_number(network: nn.Module, file: Path) -> None:
    for number in (1, 5, 33):
        assert checked(network, file, torch.randn(number, 3, 16, 16)).scores < 1e-5


def test_a_graph_that_differs_is_told_and_not_kept(
        network: nn.Module, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).eval()
    with pytest.raises(SaccadeError, match="onnxruntime differs from PyTorch by .* more than 1e-04"):
        checked(other, file, torch.randn(2, 3, 16, 16))
    monkeypatch.setattr(room, "write_onnx", lambda program, part: part.write_bytes(file.read_bytes()))
    with pytest.raises(SaccadeError, match="differs"):
        export_square(other, tmp_path / "model.onnx", torch.randn(2, 3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_int8_holds_convolutions_and_layers_near_the_scores(network: nn.Module, file: Path) -> None:
    images, target = torch.randn(40, 3, 16, 16), file.with_name("int8.onnx")
    quantize(file, target, images.numpy())
    nodes = [node.op_type for node in onnx.load(target).graph.node]
    assert nodes.count("DequantizeLinear") >= 3 + 3  # of three layers the weights and what comes in
    stored = {tensor.data_type for tensor in onnx.load(target).graph.initializer if np.prod(tensor.dims) > 300}
    assert stored == {onnx.TensorProto.INT8}
    with torch.no_grad():
        wanted = network(images).numpy()
    got = open_session(target).run(None, {"image": images.numpy()})[0]
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max() and np.abs(got - wanted).max() > 0
    assert [path.name for path in file.parent.iterdir() if path.suffix != ".onnx"] == []


def test_latency_says_with_what_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, none = Graphs({ONNX: Path("a"), INT8: Path("b")}), Graphs({}, "RuntimeError: no such operator")
    threads = f"one picture, {torch.get_num_threads()} thread"
    assert latency_of({"a": whole}).startswith("onnxruntime ") and threads in latency_of({"a": whole})
    assert "not onnxruntime, which has no graph of b (RuntimeError: no such operator)" in latency_of(
        {"a": whole, "b": none})
    monkeypatch.setattr(graphs, "has_onnx", lambda: False)
    assert latency_of({}).startswith("PyTorch ") and latency_of({}).endswith(
        '; pip install "saccade[export]" ranks by onnxruntime')
