"""The map of tasks: every system of the mission stands on it, and what it says to type exists."""

from __future__ import annotations

import re

from saccade.cli import app
from saccade.papers.survey_applications import TASKS
from saccade.tools.catalog import systems, tasks_page


def test_every_system_has_its_place():
    rows, page = systems(), tasks_page()
    assert {kind for row in rows for kind in row["kinds"]} == set(TASKS)
    cells = {name for line in page.splitlines() if line.startswith("| ") for name in re.findall(r"[\w]+", line)}
    assert {row["slug"] for row in rows} <= cells
    verified = next(row for row in rows if row["slug"] == "swin")
    assert f"[swin](../saccade/papers/{verified['papers'][0]}.py)" in page


GENERAL = {"list", "find", "info", "verify"}  # of the library, not of a task


def test_it_names_all_commands_that_there_are():
    groups = {group.name for group in app.registered_groups}
    known = {command.name or command.callback.__name__ for command in app.registered_commands} | groups
    assert {name for task in TASKS.values() for name in task.commands} == known - GENERAL


def test_what_restores_is_trained_and_explained_too():
    assert "| `saccade restore`, `train`, `saccade.attribution.restoration` |" in tasks_page()
