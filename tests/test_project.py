"""The files around the library say what is true: workflows, citation, version."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tomllib
import yaml

import saccade

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: Path) -> list[dict]:
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_little_and_ends(workflow):
    said = read(workflow)
    assert said["permissions"] == {"contents": "read"}
    assert said["concurrency"]["cancel-in-progress"]
    assert all({"runs-on", "timeout-minutes", "steps"} <= job.keys() for job in said["jobs"].values())
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", step["uses"])
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_exists(workflow):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for command in (step["run"] for step in steps(workflow) if "run" in step):
        words = shlex.split(command)
        if words[0] == "make":
            assert set(words[1:]) <= targets
        for word in words:
            assert not word.endswith(".py") or (ROOT / word).is_file()
            extras = re.fullmatch(r"\.\[(.*)\]", word)
            assert not extras or set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_workflows_cover_systems_and_versions():
    said = read(ROOT / ".github" / "workflows" / "ci.yml")
    assert {"push", "pull_request", "schedule"} <= said[True].keys()  # YAML reads the word `on` as true
    assert said["jobs"]["smoke"]["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert lowest in said["jobs"]["smoke"]["strategy"]["matrix"]["python"]
    assert any("lowest-direct" in step.get("run", "") for step in said["jobs"]["test-lowest"]["steps"])


def test_the_workflow_installs_what_make_installs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.search(r"^EXTRAS := (.*)$", makefile, re.M)[1]
    lowest = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test-lowest"]["steps"]
    assert any(f".[{extras}]" in step.get("run", "") for step in lowest)


def test_citation_and_version_agree():
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == saccade.__version__ == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
