"""Any mixer at any site: `create_model(..., mixer=...)` by name, stage, pattern and callable."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from saccade import SaccadeError, create_mixer, create_model, list_mixers
from saccade.papers.convnext import Depthwise
from saccade.papers.metaformer import Pooling
from saccade.papers.nat import Neighborhood
from saccade.papers.swin import ShiftedWindow
from saccade.tools.matrix import PAGE, column, hosts
from saccade.tools.pages import recorded

HOSTS = ("swin_nano", "convnext_nano", "deit_nano")


def mixers(model):
    return [block.mixer for stage in model.stages for block in stage.blocks]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_in_three_hosts(name, host):
    """Forward and backward at an odd size."""
    model = create_model(host, num_classes=3, mixer=name, **({"prefix_mode": "mean"} if host == "deit_nano" else {}))
    out = model(torch.randn(2, 3, 37, 29))
    out.sum().backward()
    assert out.shape == (2, 3) and out.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_matrix_is_of_all_pairs():
    columns = recorded(PAGE.read_text(encoding="utf-8"))
    assert {host: list(cells) for host, cells in columns.items()} == {host: list_mixers() for host in hosts()}


@pytest.mark.slow
@pytest.mark.parametrize("host", hosts())
def test_the_matrix_is_true(host):
    """Every mixer in one backbone, run again."""
    assert column(host) == recorded(PAGE.read_text(encoding="utf-8"))[host]


def test_by_stage_pattern_and_callable():
    named = mixers(create_model("swin_nano", mixer="neighborhood", kernel=5))
    assert {type(mixer) for mixer in named} == {Neighborhood} and named[0].kernel == 5
    staged = mixers(create_model("swin_nano", mixer=["pooling", "neighborhood", partial(Depthwise, kernel=3)]))
    assert [type(mixer) for mixer in staged] == [Pooling, Neighborhood, Neighborhood, Depthwise, Depthwise]
    assert staged[-1].kernel == 3
    patterns = {"stages.2.blocks.1": "pooling", "stages.0.*.mixer": "identity"}
    patterned = mixers(create_model("swin_nano", mixer=patterns))
    assert [type(mixer).__name__ for mixer in patterned] == ["Identity", *["ShiftedWindow"] * 3, "Pooling"]
    called = mixers(create_model("convnext_nano", mixer=lambda site: ShiftedWindow(site, window=2)))
    assert [mixer.window for mixer in called] == [(2, 2)] * 5


def test_what_makes_no_sense_is_one_line():
    for options, said in [
        (dict(mixer="neighbourhood"), "neighborhood"),
        (dict(mixer="neighborhood", kernle=5), "kernel"),
        (dict(mixer={"stages.9.*": "pooling"}), "matches no block"),
        (dict(mixer=["pooling"]), "one a stage"),
    ]:
        with pytest.raises(SaccadeError, match=said):
            create_model("swin_nano", **options)
    with pytest.raises(SaccadeError, match='prefix_mode="none" or "mean"'):
        create_model("deit_nano", mixer="pooling")
    with pytest.raises(SaccadeError, match="divide"):
        from saccade import Site

        create_mixer("attention", Site(30, 4))
