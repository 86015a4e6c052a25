"""The table of all mixers: what is measured is right for those that everybody knows, and the page is not stale."""

from __future__ import annotations

import pytest

from saccade.core.index import list_mixers, mixer_paper, paper_module
from saccade.core.template import Template
from saccade.tools.templates import PAGE, depends_on_content, growth, page, reach_of


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_states_its_template(name):
    module = paper_module(mixer_paper(name))
    template = getattr(module, module.CARD.mixers[name]).template
    assert isinstance(template, Template) and all(template)


@pytest.mark.parametrize("name, cost, content, reach", [
    ("attention", 2.0, True, "all"), ("window", 1.0, True, "6"), ("depthwise", 1.0, False, "3"),
    ("spatial_fc", 2.0, False, "all"), ("spectral_gating", 0.0, False, "all"), ("outlook", 1.0, True, "2"),
    ("focal_modulation", 1.0, True, "all"), ("identity", 0.0, False, "0"), ("grid_attention", 1.0, True, "222"),
])
def test_what_is_measured(name, cost, content, reach):
    assert growth(name) == pytest.approx(cost, abs=0.02)
    assert depends_on_content(name) is content
    assert reach_of(name) == reach


def test_the_page_is_not_stale():
    assert PAGE.read_text(encoding="utf-8") == page()
