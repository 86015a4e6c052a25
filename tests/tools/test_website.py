"""The generated pages of the site: complete, and without a dead link. mkdocs itself checks the built ones."""

from __future__ import annotations

import posixpath
import re

import pytest
from typer.main import get_command

from saccade.cli import app
from saccade.core.index import index
from saccade.tools.catalog import ROOT
from saccade.tools.website import LINK, commands_page, pages, prose, relinked


@pytest.fixture(scope="module")
def made():
    return dict(pages())


def test_every_paper_has_a_page_and_stands_on_a_page_of_its_kind(made):
    papers = index()["papers"]
    assert {page for page in made if page.startswith("papers/")} == {f"papers/{paper}.md" for paper in papers}
    kinds = "".join(text for page, text in made.items() if page.startswith("kinds/"))
    assert all(f"](../papers/{paper}.md)" in kinds for paper in papers)


def test_a_page_tells_what_the_card_knows(made):
    page = made["papers/biformer.md"]
    for said in (
        "# biformer", "every region of the map chooses", "rayleizhu/BiFormer/tree/1697bbb", "MIT", "paper, code",
        'mixer="bilevel_routing"', "| `biformer_tiny` | 13.1 M | 2.2 G | 81.4 |", "`op_bilevel_routing_attention`",
        "```text\nA_r[i, j] = q_r[i] . k_r[j],        I[i] = the k regions j of largest A_r[i, j];\n```",
    ):
        assert said in page
    assert 'saccade.apply(model, "evit")  # options: keep' in made["papers/evit.md"]
    assert 'pretraining(model, "mae")' in made["papers/mae.md"]
    assert 'saccade.explain(model, image, "t_tame").maps' in made["papers/t_tame.md"]


def test_no_link_is_dead(made):
    docs = {path.relative_to(ROOT / "docs").as_posix(): path for path in (ROOT / "docs").rglob("*") if path.is_file()}
    written = {page: relinked(path.read_text(encoding="utf-8"), f"docs/{page}")
               for page, path in docs.items() if page.endswith(".md")}
    there = made.keys() | docs.keys()
    for page, text in {**made, **written}.items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        targets = {target for _, target, _ in LINK.findall(text) if ":" not in target}
        dead = {target for target in targets if posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
                not in there}
        assert not dead, f"{page}: {dead}"


def test_links_of_the_repository_become_links_of_the_site():
    assert relinked("[a](docs/explain.md#models)", "README.md") == "[a](explain.md#models)"
    assert relinked("[a](../saccade/papers/swin.py)", "docs/systems.md") == "[a](papers/swin.md)"
    assert relinked("[a](../benchmarks/RESULTS.md)", "docs/restoration.md") == "[a](benchmarks.md)"
    assert relinked("[![a](docs/report.png)](docs/sample-report.html)", "README.md") == \
        "[![a](report.png)](sample-report.html)"
    assert relinked("[a](../pyproject.toml)", "docs/explain.md") == "a"
    assert relinked("[a](../nowhere.md)", "docs/explain.md") == "[a](../nowhere.md)"
    assert relinked("[a](https://arxiv.org/abs/1)", "README.md") == "[a](https://arxiv.org/abs/1)"


def test_every_command_and_its_options_are_on_a_page():
    page = commands_page(get_command(app))
    assert "## saccade compare" in page and "## saccade weights get" in page
    assert "| `--budget` |" in page and "| `--apply` |" in page


def test_docstrings_become_markdown():
    assert prose("x of (B, *grid, C),\n    y = x_i * x_j\nand `a_b`.") == \
        "x of (B, \\*grid, C),\n\n```text\ny = x_i * x_j\n```\n\nand `a_b`."
    assert prose("one\ntwo\n\nthree <b>") == "one\ntwo\n\nthree &lt;b>"
