"""How a method is written on a command line."""

from __future__ import annotations

import pytest

from saccade import SaccadeError
from saccade.core.apply import parse_method, split_methods


@pytest.mark.parametrize(("text", "wanted"), [
    ("token_merging", ("token_merging", {})),
    ("evit:keep=0.7", ("evit", {"keep": 0.7})),
    (" evit : keep = 0.7 , layers=(3, 6),fuse=False", ("evit", {"keep": 0.7, "layers": (3, 6), "fuse": False})),
    ("evit:keep=half", ("evit", {"keep": "half"})),
])
def test_a_method_and_its_options(text, wanted):
    assert parse_method(text.replace(" :", ":")) == wanted


def test_several_methods():
    assert split_methods("evit:keep=0.7,layers=(3,6),fuse=False, token_merging:r=8,evit") == (
        "evit:keep=0.7,layers=(3,6),fuse=False", "token_merging:r=8", "evit")
    assert split_methods("") == ()


@pytest.mark.parametrize(("text", "words"), [
    ("evitt:keep=1", "did you mean evit"), ("evit:keep", "'keep' is no option"), ("evit:=3", "'=3' is no option"),
    ("evit:keep=1,keep=2", "'keep=2' is no option"), ("evit:keep=", "'keep=' is no option"),
    ("evit:2keep=1", "no option"), ("evit:layers=(3 6)", r"'\(3 6\)' is no value"),
    ("evit:keep=0.7:layers=(3,6)", "is no value; write a number, a word or a list as in evit:layers"),
])
def test_what_is_not_so_written(text, words):
    with pytest.raises(SaccadeError, match=words):
        parse_method(text)


def test_an_open_bracket_ends_with_the_text():
    assert split_methods("evit:layers=(3,6") == ("evit:layers=(3,6",)
