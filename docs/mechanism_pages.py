"""A page for every mechanism, made while the documentation is built: nothing here names one.

mkdocs calls the two functions on_config and on_files (mkdocs.yml: hooks).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from farfield import mechanisms
from farfield.cli.mechanisms import able, defaults, describe, draw, idea

FOLDER = "mechanisms"
TOKENS = 1024  # of a picture
SIZES = {"heads": 4, "kv_heads": 4, "width": 64}


def on_config(config: Any) -> Any:
    """Add the pages to the navigation."""
    pages = [{"All": f"{FOLDER}/index.md"}, *({name: f"{FOLDER}/{name}.md"} for name in mechanisms.names())]
    before = next(n for n, entry in enumerate(config.nav) if "Adding a mechanism" in entry)
    config.nav.insert(before, {"Mechanisms": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what the pages are made of."""
    from mkdocs.structure.files import File

    for path, content in contents():
        files.append(File.generated(config, path, content=content))
    return files


def contents() -> Iterator[tuple[str, str]]:
    """Path in the documentation, and text, of each page and picture."""
    rows = ["# Mechanisms", "", "| name | idea | can |", "| --- | --- | --- |"]
    for name in mechanisms.names():
        kind = mechanisms.get(name)
        cells = f"[{name}]({name}.md)", idea(kind), ", ".join(able(kind.supports))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        picture = svg(name)
        if picture is not None:
            yield f"{FOLDER}/{name}.svg", picture
        yield f"{FOLDER}/{name}.md", page(name, pictured=picture is not None)
    yield f"{FOLDER}/index.md", "\n".join([*rows, ""])


def page(name: str, *, pictured: bool) -> str:
    """The page of one mechanism."""
    kind = mechanisms.get(name)
    paper = kind.paper
    title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.title
    code = f" [Code](https://{paper.code})." if paper.code else ""
    lines = [f"# {name}", "", f"{title}, {paper.authors}, {paper.year}.{code}", "", markdown(describe(kind)), ""]
    if pictured:
        lines += ["## What reads what", "", f"![Row blocks that each query block reads]({name}.svg)", ""]
    lines += [
        "## Use", "",
        "```python", "import torch, farfield as ff", "",
        f"q, k, v = torch.randn(3, 1, {SIZES['heads']}, 256, {SIZES['width']})",
        f'out = ff.attention(q, k, v, "{name}", is_causal=True)', "```", "",
        f"It can do: {', '.join(able(kind.supports))}.", "",
        "| option | default |", "| --- | --- |",
        *(f"| `{option}` | `{default!r}` |" for option, default in defaults(kind).items()), "",
        f"::: {kind.__module__}.{kind.__qualname__}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def markdown(text: str) -> str:
    """A module's description, with an empty line before what Markdown would take for the end of a paragraph."""
    lines: list[str] = []
    for line in text.splitlines():
        listed = line.startswith("- ") and not lines[-1].startswith(("- ", "  "))
        if lines and lines[-1].strip() and (listed or line.startswith("Departs from")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def svg(name: str) -> str | None:
    """The picture of `farfield show NAME --plot`, None for mechanisms that have none."""
    mechanism = mechanisms.make_for(name, {}, **SIZES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layout.svg"
        try:
            draw(mechanism, TOKENS, path)
        except NotImplementedError:
            return None
        return path.read_text(encoding="utf-8")
