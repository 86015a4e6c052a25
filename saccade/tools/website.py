"""Pages of the documentation site that are made from cards, docstrings and goldens: `make site` builds it.

Plain Markdown, so that nothing here needs mkdocs; `docs/theme/hooks.py` hands the pages to it.
"""

from __future__ import annotations

import ast
import inspect
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import saccade
from saccade.core.index import index, paper_module
from saccade.core.weights import published, status
from saccade.tools.catalog import CODE, EXCEPTIONS
from saccade.tools.pages import ROOT


@dataclass(frozen=True)
class Kind:
    """A view of the cards: the kinds that it takes in, and what of a card bears a name there."""

    title: str
    kinds: frozenset[str]
    named: str
    about: str


KINDS = {
    "mixers": Kind("Token mixers", frozenset({"mixer"}), "mixers",
                   "What moves information between places of the map: `create_model(BACKBONE, mixer=NAME)`, or "
                   "`swap(model, PATTERN, NAME)` in a trained model."),
    "backbones": Kind("Backbones", frozenset({"backbone"}), "models",
                      "Whole networks from picture to maps and classes: `create_model(NAME)`."),
    "restoration": Kind("Heads and restoration", frozenset({"restoration", "segmentation", "pooling"}), "models",
                        "What stands on a backbone, or gives a picture back."),
    "reductions": Kind("Token reductions", frozenset({"token reduction"}), "methods",
                       "A trained transformer computes less: `apply(model, NAME)`."),
    "pretraining": Kind("Pre-training", frozenset({"pretraining"}), "methods",
                        "What a backbone learns from pictures without labels: `pretraining(model, NAME)`."),
    "attribution": Kind("Explanation", frozenset({"explain", "attribution"}), "methods",
                        "Which pixels made the score, and what a network has learned: `explain(model, image, NAME)`."),
    "sequences": Kind("Sequences", frozenset({"sequence"}), "models",
                      "What reads texts, histories and sets of points rather than pictures: modules of its files."),
    "further": Kind("Further", frozenset(), "models", "What belongs to none of the other kinds."),
}
# Files of the repository that are pages, and where; docs/ itself is the site's root.
WHOLE = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md", "benchmarks/RESULTS.md": "benchmarks.md",
}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\]\([^()]*\))*)\]\(([^()\s#]+)((?:#[^()\s]*)?)\)")


def pages() -> Iterator[tuple[str, str]]:
    """Each generated page: its path in the site, and its Markdown."""
    for source, page in WHOLE.items():
        wide = "---\nhide: [navigation]\n---\n" if page == "index.md" else ""
        yield page, wide + relinked((ROOT / source).read_text(encoding="utf-8"), source)
    yield "exceptions.md", exceptions_page()
    for kind in KINDS:
        yield f"kinds/{kind}.md", kind_page(kind)
    for paper in index()["papers"]:
        yield f"papers/{paper}.md", "---\nsearch: {boost: 2}\n---\n" + paper_page(paper)
    yield "reference/saccade.md", reference_page()


def relinked(markdown: str, source: str) -> str:
    """Links as they stand in the file `source` of the repository, as the site needs them.

    What is no page of the site keeps its words and loses its link; what is not there at all stays, for the strict
    build to find.
    """
    page = _page_of(source)

    def anew(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        words = LINK.sub(anew, words)  # a picture in the words of a link
        if ":" in target:
            return f"[{words}]({target}{anchor})"
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = _page_of(path)
        if found:
            return f"[{words}]({posixpath.relpath(found, posixpath.dirname(page) or '.')}{anchor})"
        return words if (ROOT / path).exists() else match.group()

    return LINK.sub(anew, markdown)


def _page_of(path: str) -> str:
    """Where a file of the repository is in the site; nothing where it is not."""
    paper = re.fullmatch(r"saccade/papers/(\w+)\.py", path)
    if paper:
        return f"papers/{paper[1]}.md"
    if path == EXCEPTIONS:
        return "exceptions.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else WHOLE.get(path, "")


def prose(docstring: str) -> str:
    """A docstring as Markdown: indented formulas become blocks of code, signs that Markdown would read are kept."""
    parts: list[tuple[bool, list[str]]] = []
    for line in docstring.strip("\n").split("\n"):
        formula = line.startswith("    ")
        if not line.strip():
            parts.append((False, []))
        elif parts and parts[-1][1] and parts[-1][0] == formula:
            parts[-1][1].append(line)
        else:
            parts.append((formula, [line]))
    blocks = ["\n".join(["```text", *(line[4:] for line in lines), "```"]) if formula else _kept("\n".join(lines))
              for formula, lines in parts if lines]
    return "\n\n".join(blocks)


def _kept(text: str) -> str:
    """Words with the signs of Markdown escaped, outside of `code`."""
    spans = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.S)
    spans[::2] = [re.sub(r"([\\*_\[\]|#])", r"\\\1", span).replace("<", "&lt;") for span in spans[::2]]
    return "".join(spans)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a column whose head ends in a colon is one of numbers."""
    lines = [[head.rstrip(":") for head in heads], ["--:" if head.endswith(":") else "---" for head in heads], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def paper_page(paper: str) -> str:
    """A paper: the idea, the facts of its card, how it is called, sizes, weights, proof, and the file itself."""
    card, module = index()["papers"][paper], paper_module(paper)
    text = inspect.getdoc(module) or ""
    idea, _, rest = text.partition("\n")
    sections = [f"# {paper}", f"**{_kept(idea)}**", prose(rest), "## The card", _facts(card)]
    for title, body in (
        ("How to call it", _calls(paper, card)), ("Sizes", _sizes(card)), ("Trained weights", _weights(card)),
        ("What proves it", _proof(card)), ("What is in the file", _contents(paper)),
    ):
        if body:
            sections += [f"## {title}", body]
    return "\n\n".join(sections) + "\n"


def _facts(card: dict[str, Any]) -> str:
    kinds = [f"[{kind.title.lower()}](../kinds/{name}.md)" for name, kind in KINDS.items() if card in _cards(name)]
    rows = [
        ("paper", f"{_kept(card['title'])}, {card['authors']}, {card['year']}"),
        ("arXiv", f"[{card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})" if card["arxiv"] else ""),
        ("authors' code", _repository(card["code"])), ("its licence", card["licence"]),
        ("licence of the weights", card["weights_licence"] if card["weights"] else ""),
        ("written from", _kept(card["read"])), ("kinds", ", ".join(kinds)),
        ("systems of the mission", ", ".join(card["systems"])), ("keywords", _kept(card["keywords"])),
    ]
    return table(("", ""), [row for row in rows if row[1]])


def _repository(code: str) -> str:
    match = CODE.fullmatch(code)
    if match is None or match[2] is None or match[3]:  # no one commit, or a remark
        return _kept(code)
    return f"[{code}](https://github.com/{match[1]}/tree/{match[2]})"


def _calls(paper: str, card: dict[str, Any]) -> str:
    """How each thing that the card names is called."""
    lines = []
    classifies = "backbone" in card["kinds"]
    if card["models"]:
        given = ", num_classes=10" if classifies else ""
        lines.append(f'model = saccade.create_model("{card["models"][0]}"{given})')
    for name in card["mixers"]:
        lines.append(f'model = saccade.create_model("convnext_tiny", mixer="{name}")')
    for name, function in card["methods"].items():
        options = [key for key in inspect.signature(getattr(paper_module(paper), function)).parameters]
        taken = ", ".join(key for key in options[1:] if key not in ("image", "target"))
        lines += _method_calls(name, card["kinds"], taken)
    if not lines:
        return ""
    imports = ["import saccade"]
    if any("pretraining(" in line for line in lines):
        imports.append("from saccade.core.pretraining import pretraining")
    return "\n".join(["```python", *imports, "", *lines, "```"])


def _method_calls(name: str, kinds: list[str], options: str) -> list[str]:
    said = f"  # options: {options}" if options else ""
    if "token reduction" in kinds:
        return [f'handle = saccade.apply(model, "{name}"){said}']
    if "pretraining" in kinds:
        return [f'objective = pretraining(model, "{name}"){said}']
    return [f'maps = saccade.explain(model, image, "{name}").maps{said}']


def _sizes(card: dict[str, Any]) -> str:
    """Parameters, multiply-adds and top-1 as the paper's tables have them; the other models below."""
    told = [name for name in card["models"] if any(name in card[what] for what in ("params", "macs", "top1"))]
    rows = [(f"`{name}`", _scaled(card["params"].get(name), 1e6, "M"), _scaled(card["macs"].get(name), 1e9, "G"),
             card["top1"].get(name, "")) for name in told]
    others = [name for name in card["models"] if name not in told]
    text = table(("model", "parameters:", "multiply-adds:", "top-1:"), rows) if rows else ""
    if rows:
        text += ("\n\nAs published: at the published image size, top-1 in percent on ImageNet-1K, the authors' claim. "
                 "`saccade info NAME` counts ours.")
    if others:
        names = ", ".join(f"`{name}`" for name in others)
        text += f"\n\n{'Without published numbers' if rows else 'Models'}: {names}."
    return text.strip()


def _scaled(value: float | None, unit: float, letter: str) -> str:
    return f"{value / unit:.4g} {letter}" if value else ""


def _weights(card: dict[str, Any]) -> str:
    rows = []
    for name in card["weights"]:
        weights = published(name)
        source = f"[{_short(weights.source)}]({weights.source})" if weights.source.startswith("http") \
            else f"`{weights.source}`"
        rows.append((f"`{name}`", source, weights.data, weights.top1 or "", weights.licence, status(name)))
    return table(("model", "where", "trained on", "top-1:", "licence", "status"), rows) if rows else ""


def _short(address: str) -> str:
    host = address.split("/")[2]
    return f"{host}: {_kept(address.rstrip('/').split('/')[-1][:48])}"


def _proof(card: dict[str, Any]) -> str:
    rows = []
    for name in card["goldens"]:
        golden = json.loads((ROOT / "tests" / "goldens" / f"{name}.json").read_text(encoding="utf-8"))
        source = golden.get("source", {})
        held = f"{len(golden['outputs'])} / {len(golden['grads'] or {})}"
        made = f"`{source.get('object', '')}` of {source.get('repo', '')}@{source.get('commit', '')[:7]}"
        rows.append((f"`{name}`", made if source.get("repo") else "", held, f"{golden['tolerance']:g}"))
    heads = ("golden", "the authors' code that made it", "outputs / gradients:", "tolerance:")
    text = table(heads, rows) if rows else ""
    if card["tests"]:
        text += "\n\nTests: " + ", ".join(f"`{test}`" for test in card["tests"]) + "."
    return text.strip() or "Nothing yet."


def _contents(paper: str) -> str:
    """The public classes and functions with their first lines, then the whole file."""
    code = (resources.files("saccade") / "papers" / f"{paper}.py").read_text(encoding="utf-8")
    public = [node for node in ast.parse(code).body
              if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")]
    rows = [(f"`{node.name}`", _kept((ast.get_docstring(node) or "").partition("\n")[0])) for node in public]
    source = "\n".join(f"    {line}".rstrip() for line in ["```python", *code.rstrip().split("\n"), "```"])
    shown = f'??? quote "saccade/papers/{paper}.py"\n\n{source}'
    return f"{table(('', ''), rows)}\n\n{shown}" if rows else shown


@lru_cache
def _claimed() -> frozenset[str]:
    return frozenset().union(*(kind.kinds for kind in KINDS.values()))


def _cards(name: str) -> list[dict[str, Any]]:
    """The cards of a view; those that no other takes are further ones."""
    kinds = KINDS[name].kinds
    return [card for card in index()["papers"].values()
            if (kinds & set(card["kinds"]) if kinds else not _claimed() & set(card["kinds"]))]


def kind_page(name: str) -> str:
    """All papers of a kind, with their idea in a line and the names that they bring."""
    kind, rows, cards = KINDS[name], [], _cards(name)
    for paper, card in index()["papers"].items():
        if card in cards:
            idea = _kept((inspect.getdoc(paper_module(paper)) or "").partition("\n")[0])
            names = list(card[kind.named])
            shown = ", ".join(f"`{each}`" for each in names[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            proven = "verified" if card["goldens"] or card["tests"] else "implemented"
            rows.append((f"[{paper}](../papers/{paper}.md)", idea, shown + more, card["year"], proven))
    return f"# {kind.title}\n\n{kind.about}\n\n{table(('paper', 'idea', kind.named, 'year', ''), rows)}\n"


def exceptions_page() -> str:
    """What published mechanisms break of the contracts, from the file that the tests read."""
    import tomllib  # Python >= 3.11; the site needs it, the library does not

    listed = tomllib.loads((ROOT / EXCEPTIONS).read_text(encoding="utf-8"))["exception"]
    lines = [f"- `{entry['name']}`, `{entry['contract']}`: {_kept(entry['reason'])} ({_kept(entry['source'])})"
             for entry in listed]
    heads = ["# Contracts that published mechanisms break", "", "Each test is run, and must fail.", ""]
    return "\n".join([*heads, *lines, ""])


def reference_page() -> str:
    """The public names of `saccade`, whose docstrings mkdocstrings lays out."""
    entries = [f"::: {getattr(saccade, name).__module__}.{name}" for name in sorted(saccade.__all__, key=str.lower)]
    return "\n\n".join(["# saccade", "Everything that `import saccade` gives.", *entries]) + "\n"


def commands_page(group: Any) -> str:
    """Every command of the application (a click Group) with its arguments and options, as it declares them."""
    lines = ["# Commands", "Bad input is one line that says what, where and what to do, and exit code 2."]
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        for key, each in inner.items() if inner else [("", command)]:
            title = f"## saccade {name} {key}".rstrip()
            lines += [title, _kept((each.help or "").strip()), table(("", ""), _options(each))]
    return "\n\n".join(lines) + "\n"


def _options(command: Any) -> list[tuple[str, str]]:
    rows = []
    for parameter in command.params:
        name = parameter.opts[-1] if parameter.param_type_name == "option" else parameter.name.upper()
        default = parameter.default
        said = f" Default: `{default}`." if default not in (None, "", False) and not callable(default) else ""
        rows.append((f"`{name}`", _kept(getattr(parameter, "help", "") or "") + said))
    return [row for row in rows if row[0] != "`--help`"]
