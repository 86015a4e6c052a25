"""The same questions put to every backbone, on one narrow registered model a family."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.tools.export import export
from tests.contracts.registered import NARROW, over, randomised


def build(name: str, **options):
    torch.manual_seed(0)
    return randomised(create_model(name, num_classes=5, **options)).eval()


@pytest.mark.parametrize("size", [(32, 32), (41, 29), (64, 48), (7, 33)])
@over("test_any_size", NARROW)
def test_any_size(name, size):
    """Non-square, and no multiple of any stride or window."""
    model = build(name)
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 5) and out.isfinite().all()


@over("test_features", NARROW)
def test_features(name):
    model = create_model(name, features_only=True).eval()
    info = model.feature_info
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 48))
    assert len(maps) == len(info) >= 2
    for value, channels, stride in zip(maps, info.channels(), info.reduction()):
        assert value.shape == (1, channels, 64 // stride, 48 // stride)
    last = create_model(name, features_only=True, out_indices=(-1,)).eval()
    side = 32 // info.reduction()[-1]
    assert [value.shape for value in last(torch.randn(1, 3, 32, 32))] == [(1, info.channels()[-1], side, side)]
    with pytest.raises(SaccadeError, match="out_indices"):
        create_model(name, features_only=True, out_indices=(99,))


@over("test_forward_is_the_head_of_the_features", NARROW)
def test_forward_is_the_head_of_the_features(name):
    model, image = build(name), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image), model.forward_head(model.forward_features(image)))


@over("test_channels_and_classes", NARROW)
def test_channels_and_classes(name):
    gray = build(name, in_chans=1)
    assert gray(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    headless = create_model(name, num_classes=0).eval()
    assert headless(torch.randn(2, 3, 32, 32)).shape == (2, headless.num_features)
    headless.reset_classifier(3)
    assert headless(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@over("test_deepcopy_and_pickle", NARROW)
def test_deepcopy_and_pickle(name):
    model, image = build(name), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(image)
        assert torch.equal(copy.deepcopy(model)(image), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image), wanted)


@over("test_batch_elements_do_not_meet", NARROW)
def test_batch_elements_do_not_meet(name):
    model, image = build(name).double(), torch.randn(3, 3, 32, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image)[1:2], model(image[1:2]), rtol=1e-8, atol=1e-9)


@over("test_evaluation_is_deterministic", NARROW)
def test_evaluation_is_deterministic(name):
    model, image = build(name, drop_path_rate=0.3), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image), model(image))


@over("test_every_parameter_learns", NARROW)
def test_every_parameter_learns(name):
    model = build(name, drop_path_rate=0.1).train()
    torch.manual_seed(1)
    out = model(torch.randn(4, 3, 32, 32))
    (out * torch.randn_like(out)).sum().backward()
    assert [key for key, value in model.named_parameters()
            if value.grad is None or not value.grad.isfinite().all() or value.grad.abs().max() == 0] == []


@over("test_autocast", NARROW)
def test_autocast(name):
    model = build(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


@over("test_own_checkpoint", NARROW)
def test_own_checkpoint(name, tmp_path):
    """Our own weights round trip; a narrower head is an error that prints what to write; fresh heeds it."""
    model, image = build(name), torch.randn(1, 3, 32, 32)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = create_model(name, num_classes=5, checkpoint_path=tmp_path / "w.pt").eval()
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    found, counters = again.load_report, sum(key.endswith("num_batches_tracked") for key in model.state_dict())
    assert found.format == "saccade" and found.loaded in (found.of - counters, found.of)
    with pytest.raises(SaccadeError, match="fresh=") as error:
        create_model(name, num_classes=7, checkpoint_path=tmp_path / "w.pt")
    patterns = eval(str(error.value).rpartition("fresh=")[2])  # what it prints is Python that works
    report = create_model(name, num_classes=7, checkpoint_path=tmp_path / "w.pt", fresh=patterns).load_report
    assert report.fresh and not report.left
    headless = create_model(name, num_classes=0, checkpoint_path=tmp_path / "w.pt")
    assert headless.load_report.dropped
    gray = create_model(name, num_classes=5, in_chans=1, checkpoint_path=tmp_path / "w.pt").eval()
    single = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(gray(single), model(single.expand(1, 3, 32, 32)), rtol=1e-3, atol=1e-4)


@over("test_another_native_size_loads", NARROW)
def test_another_native_size_loads(name, tmp_path):
    torch.save(build(name).state_dict(), tmp_path / "w.pt")
    model = create_model(name, num_classes=5, img_size=48, checkpoint_path=tmp_path / "w.pt").eval()
    assert model(torch.randn(1, 3, 48, 48)).isfinite().all()


@over("test_exported_once_runs_at_four_sizes", NARROW, slow=[name for n, name in enumerate(NARROW) if n % 10])
def test_exported_once_runs_at_four_sizes(name):
    model = build(name)
    program = export(model, (40, 56))
    with torch.no_grad():
        for batch, size in [(2, (40, 56)), (3, (32, 32)), (4, (64, 48)), (2, (51, 37))]:
            image = torch.randn(batch, 3, *size)
            torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if position % 10 == 1 else pytest.mark.slow)
                                  for position, name in enumerate(NARROW)])
def test_compiles_whole(name):
    model, image = build(name), torch.randn(1, 3, 32, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-4)
