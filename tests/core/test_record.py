"""What `record` gives is the attention that ran, laid between numbered tokens."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model, record


def test_global_attention_is_its_softmax():
    torch.manual_seed(0)
    mixer = create_mixer("attention", Site(8, 2, grid=(2, 3)))
    model, x = torch.nn.Sequential(mixer), torch.randn(2, 2, 3, 8)
    with record(model) as r:
        model(x)
    q, k, _ = mixer.qkv(x.flatten(1, 2)).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(r["0"].dense(batch=2), (q @ k.mT / 2).softmax(-1))


def test_windows_are_laid_on_the_grid():
    """Tokens of a window see each other and no others, wherever the window was computed; padding is left out."""
    mixer = create_mixer("shifted_window", Site(8, 2, index=0, grid=(8, 8)), window=4)
    model = torch.nn.Sequential(mixer)
    with record(model) as r:
        model(torch.randn(1, 8, 8, 8))
    dense = r["0"].dense()[0, 0].view(8, 8, 8, 8)
    assert (dense[1, 2, :4, :4] > 0).all() and dense[1, 2, :4, :4].sum().item() == pytest.approx(1)
    assert dense[1, 2, 4:].sum() == 0 and dense[1, 2, :, 4:].sum() == 0
    shifted = create_mixer("shifted_window", Site(8, 2, index=1, grid=(8, 8)), window=4)
    model = torch.nn.Sequential(shifted)
    with record(model) as r:
        model(torch.randn(1, 8, 8, 8))
    dense = r["0"].dense()[0, 0].view(8, 8, 8, 8)
    assert dense[3, 3, 2:6, 2:6].sum().item() == pytest.approx(1)  # the window that straddles the first four
    assert dense[0, 0, :2, :2].sum().item() == pytest.approx(1)  # a corner region keeps to itself


def test_neighborhoods_are_laid_on_the_grid():
    mixer = create_mixer("neighborhood", Site(8, 2, grid=(20, 20)), kernel=3)
    model = torch.nn.Sequential(mixer)
    with record(model) as r:
        model(torch.randn(1, 20, 20, 8))
    dense = r["0"].dense()[0, 1].view(20, 20, 20, 20)
    assert dense[10, 7, 9:12, 6:9].sum().item() == pytest.approx(1)
    assert dense[0, 0, :3, :3].sum().item() == pytest.approx(1)
    torch.testing.assert_close(dense.sum((2, 3)), torch.ones(20, 20))


def test_whole_model_by_name_and_pattern():
    model = create_model("swin_nano").eval()
    with torch.no_grad(), record(model, "stages.1.*.mixer") as r:
        model(torch.randn(2, 3, 32, 32))
    assert r.keys() == ["stages.1.blocks.0.mixer", "stages.1.blocks.1.mixer"]
    assert r["stages.1.blocks.0.mixer"].dense(batch=2).shape == (2, 2, 64, 64)
    with pytest.raises(SaccadeError, match="nothing was recorded"):
        r["stages.0.blocks.0.mixer"]
    with pytest.raises(SaccadeError, match="matches no module"), record(model, "stage.*"):
        pass


def test_prefix_tokens_come_first():
    model = create_model("deit_nano").eval()
    with torch.no_grad(), record(model) as r:
        model(torch.randn(1, 3, 32, 32))
    assert r["blocks.0.mixer"].dense().shape == (1, 2, 65, 65)


def test_nothing_stays_behind():
    model = create_model("deit_nano").eval()
    with pytest.raises(RuntimeError), record(model):
        model(torch.randn(1, 5, 32, 32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
