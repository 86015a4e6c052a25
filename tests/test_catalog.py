"""Cards, the generated tables and the mission's list agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saccade import create_model, list_models
from saccade.core.index import index, is_backbone
from saccade.core.weights import PERMISSIVE
from saccade.tools.catalog import build_index, cards, generated, notice, systems

ROOT = Path(__file__).parents[1]


def test_nothing_generated_is_stale():
    assert [path.name for path, text in generated() if path.read_text(encoding="utf-8") != text] == []


def test_every_claimed_system_is_of_the_mission_and_claimed_once():
    slugs = [row["slug"] for row in systems()]
    assert len(slugs) == len(set(slugs)) == 248
    claims = [slug for card in cards().values() for slug in card.systems]
    assert set(claims) <= set(slugs)
    own = [slug for slug in claims if not slug.startswith("survey_")]  # what a survey treats fills several files
    assert len(own) == len(set(own))


def test_every_network_that_is_no_backbone_can_be_built():
    """Backbones are built to count their parameters; without memory, this takes seconds for the others."""
    names = [name for name in list_models() if not is_backbone(name)]
    assert {"dtop_segvit_large", "hat_x4"} <= set(names) and len(names) > 40
    with torch.device("meta"):
        for name in names:
            assert any(parameter.numel() for parameter in create_model(name).parameters()), name


def test_the_notice_names_whose_code_was_read_and_only_that():
    text = notice()
    assert "https://github.com/microsoft/Swin-Transformer, commit f82860b\n  licence: MIT" in text
    named = {line.removeprefix("saccade/papers/").removesuffix(".py") for line in text.splitlines()
             if line.startswith("saccade/papers/")}
    assert named == {paper for paper, card in cards().items() if "code" in card.read and card.code}
    licences = {line.partition(": ")[2] for line in text.splitlines() if line.startswith("  licence: ")}
    assert licences <= PERMISSIVE  # code under other licences, or none, stays unread
    assert "NOTICE" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("paper", cards())
def test_proofs_exist(paper):
    card = cards()[paper]
    assert all((ROOT / "tests" / "goldens" / f"{golden}.json").exists() for golden in card.goldens)
    assert all((ROOT / test).exists() for test in card.tests)


@pytest.mark.parametrize("name", sorted(name for card in build_index()["papers"].values() for name in card["params"]))
def test_published_parameter_counts(name):
    """What the paper's table says: within 2 %, or off by less than a million where a table gives whole ones."""
    import torch

    with torch.device("meta"):
        model = create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    paper = index()["papers"][index()["models"][name]]["params"][name]
    assert count == pytest.approx(paper, rel=0.02, abs=1e6)


def test_public_names_and_commands_are_a_visible_act():
    """Edit tests/surface.json in the same change that adds or removes a public name, a command or an option."""
    import saccade
    import saccade.golden
    from saccade.cli import app

    commands = {}
    groups = {"": app} | {f"{group.name} ": group.typer_instance for group in app.registered_groups}
    for group, application in groups.items():
        for command in application.registered_commands:
            name = group + (command.name or command.callback.__name__)
            commands[name] = [key for key in command.callback.__annotations__ if key not in ("return", "context")]
    names = {"names": sorted(saccade.__all__), "golden": sorted(saccade.golden.__all__)}
    surface = names | {"commands": commands}
    assert surface == json.loads((ROOT / "tests" / "surface.json").read_text(encoding="utf-8"))
