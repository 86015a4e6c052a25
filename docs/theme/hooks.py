"""What mkdocs calls while it builds the site: adds the generated pages, orders the menu, mends links."""

from __future__ import annotations

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url
from typer.main import get_command

from saccade.cli import app
from saccade.tools.website import KINDS, commands_page, pages, relinked

EXAMPLES = ("mixer", "backbone", "restoration", "reduction", "pretraining", "explanation")
SHIM = "https://unpkg.com/iframe-worker/shim"
PROJECT = ("contributing", "changelog", "security", "benchmarks", "exceptions")


def on_files(files: Files, config) -> Files:
    made = {**dict(pages()), "reference/commands.md": commands_page(get_command(app))}
    for path, markdown in made.items():
        files.append(File.generated(config, path, content=markdown))
    guides = sorted(file.src_uri for file in files.documentation_pages() if "/" not in file.src_uri)
    guides = [page for page in guides if page != "index.md" and page.removesuffix(".md") not in PROJECT]
    papers = sorted(page for page in made if page.startswith("papers/"))
    config.nav = [
        {"Home": "index.md"},
        {"Examples": [f"examples/{name}.md" for name in EXAMPLES]},
        {"Guides": guides},
        {"Papers": [*(f"kinds/{kind}.md" for kind in KINDS), {"All": papers}]},
        {"Reference": ["reference/saccade.md", "reference/commands.md"]},
        {"Project": [f"{name}.md" for name in PROJECT]},
    ]
    return files


def on_post_page(output: str, page, config) -> str:
    """The search of a site opened as files needs a shim, which the theme would take from the network."""
    return output.replace(SHIM, get_relative_url("theme/iframe-worker.js", page.url))


def on_page_markdown(markdown: str, page, config, files) -> str:
    if page.file.generated_by:
        return markdown  # its links are right
    if page.file.src_uri == "matrix.md":  # a hundred columns: their heads stand upright
        markdown = markdown.replace("\n| ", '\n<div class="matrix" markdown>\n\n| ', 1) + "\n</div>\n"
    return relinked(markdown, f"docs/{page.file.src_uri}")
