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
    torch = next(line for line in PROJECT["dependencies"] if line.startswith("torch>="))
    pinned = f'"{torch.replace(">=", "==")}.*"'
    assert any(pinned in step.get("run", "") for step in said["jobs"]["test-lowest"]["steps"])


def test_the_workflow_installs_what_make_installs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.search(r"^EXTRAS := (.*)$", makefile, re.M)[1]
    lowest = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test-lowest"]["steps"]
    assert any(f".[{extras}]" in step.get("run", "") for step in lowest)


def test_the_lowest_torch_is_one():
    lowest = next(re.fullmatch(r"torch>=(\d+)\.(\d+)", line) for line in PROJECT["dependencies"] if "torch>" in line)
    version, (major, minor) = lowest[0].removeprefix("torch>="), lowest.groups()
    makefile, readme, workflow = ((ROOT / name).read_text(encoding="utf-8")
                                  for name in ("Makefile", "README.md", ".github/workflows/ci.yml"))
    assert f"torch >= {version} " in makefile and f">= ({major}, {minor})" in makefile
    assert f"torch >= {version} " in readme and f'"torch=={version}.*"' in workflow


def packages(extra):
    """What an extra installs, by the names under which Python imports it."""
    imported = {"scikit-learn": "sklearn", "scikit-image": "skimage"}
    named = (re.match(r"[\w-]+", line)[0] for line in PROJECT["optional-dependencies"][extra])
    return {imported.get(name, name) for name in named}


def test_the_library_uses_what_its_extras_install():
    """What is missing is asked for by the extra that brings it, and an extra brings nothing else."""
    extras = [name for name in PROJECT["optional-dependencies"] if name not in ("all", "docs", "dev")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "saccade").rglob("*.py"))
    asked = re.findall(r'optional\("(\w+)[\w.]*", extra="(\w+)"\)', source)
    assert len(asked) > 30 and {extra for _, extra in asked} == set(extras)
    assert all(module in packages(extra) for module, extra in asked)
    for module in set().union(*map(packages, extras)):
        assert re.search(rf'import {module}\b|from {module}\b|"{module}[".]', source), f"nothing uses {module}"
    wanted = ",".join(name for name in extras if name != "natten")  # which is built for one CUDA and one torch
    assert PROJECT["optional-dependencies"]["all"] == [f"saccade[{wanted}]"]


def test_citation_and_version_agree():
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == saccade.__version__ == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
