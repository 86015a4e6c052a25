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


def test_commands_that_it_names_exist():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = {name for task in TASKS.values() for name in re.findall(r"`saccade (\w+)", task.start)}
    assert named and named <= known
