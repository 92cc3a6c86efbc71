"""list, find, show, new: what mechanisms there are, what one does, and the file of another one."""

from __future__ import annotations

import difflib
import inspect
import keyword
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farfield.cli.options import examples, number, parse, unset

if TYPE_CHECKING:
    from farfield.mechanism import Mechanism, Supports

Name = Annotated[str, typer.Argument(metavar="NAME", help="Registry name, as in farfield list.", show_default=False)]


def register(app: typer.Typer, panel: str) -> None:
    """Add the commands of this file to `app`."""
    app.command(
        "list", rich_help_panel=panel, epilog=examples("farfield list", "farfield list --markdown > MECHANISMS.md")
    )(list_)
    app.command(rich_help_panel=panel, epilog=examples("farfield find multipole", "farfield find sliding window"))(find)
    app.command(
        rich_help_panel=panel,
        epilog=examples("farfield show fma", "farfield show fma --plot fma.png --tokens 2048 --option block=32"),
    )(show)
    app.command(
        rich_help_panel=panel, epilog=examples("farfield new my-attention", "farfield new my-attention --folder mine")
    )(new)


def list_(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print MECHANISMS.md instead of a table.")] = False,
) -> None:
    """List the mechanisms with their papers and what they can do."""
    if markdown:
        typer.echo(table_markdown(), nl=False)
    else:
        _print_table(_names())


def find(
    words: Annotated[list[str], typer.Argument(metavar="WORD...", help="All of them must occur.", show_default=False)],
) -> None:
    """Search names, titles, authors and descriptions."""
    found = [n for n in _names() if all(w.lower() in _text(n) for w in words)]
    if found:
        return _print_table(found)
    known = sorted({word for n in _names() for word in _text(n).split() if word.isalpha()})
    near = [w for word in words for w in difflib.get_close_matches(word.lower(), known, n=2, cutoff=0.75)]
    raise ValueError(
        f"find: no mechanism mentions {' and '.join(map(repr, words))}"
        + (f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else "; farfield list shows all")
    )


def show(
    name: Name,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what reads what into this file (.png, .svg, .pdf).")
    ] = None,
    tokens: Annotated[str, typer.Option(metavar="N", help="Sequence length of the picture.")] = "1k",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the mechanism.")
    ] = None,
) -> None:
    """Show one mechanism: description, paper, capabilities, options, cases."""
    from rich.console import Console
    from rich.table import Table

    from farfield import mechanisms

    kind = mechanisms.get(name)
    if plot is not None:
        draw(mechanisms.make(name, **parse(option)), number(tokens, "--tokens"), plot)
        typer.echo(f"wrote {plot}")
        return

    console = Console(highlight=False)
    console.print(f"[bold]{name}[/]  {inspect.getfile(kind)}", soft_wrap=True)
    console.print()
    console.print(describe(kind), markup=False, soft_wrap=True)
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    paper = kind.paper
    grid.add_row("paper", f"{paper.title}, {paper.authors} {paper.year}")
    if paper.arxiv:
        grid.add_row("", f"https://arxiv.org/abs/{paper.arxiv}")
    if paper.code:
        grid.add_row("code", f"https://{paper.code}")
    grid.add_row("can", ", ".join(able(kind.supports)))
    for n, (option_name, default) in enumerate(defaults(kind).items()):
        grid.add_row("" if n else "options", f"{option_name}={default!r}")
    for n, case in enumerate(kind.cases):
        grid.add_row("" if n else "cases", f"{case} on {case.tokens} tokens")
    console.print(grid)


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower case, hyphens between words.", show_default=False)],
    folder: Annotated[
        Path | None,
        unset("farfield/mechanisms of this checkout", "Where to write.", metavar="DIR"),
    ] = None,
) -> None:
    """Write the file of a new mechanism: a complete small example to change."""
    path = write_template(name, folder)
    typer.echo(f"wrote {path}")
    if folder is not None:
        typer.echo(f"make it known   export FARFIELD_MECHANISMS={folder.resolve()}")
    else:
        typer.echo("list it         farfield list --markdown > MECHANISMS.md")
    typer.echo(f"look at it      farfield show {name}")
    typer.echo(f"test it         python -m pytest tests -k {name}")


def write_template(name: str, folder: Path | None = None) -> Path:
    """Write the template for mechanism `name`, to `folder` or this checkout's mechanisms; returns the file.

    Raises:
        ValueError: `name` is no registry name or is taken, or farfield is not a checkout and `folder` is not given.
        FileExistsError: the file exists.
    """
    from farfield import mechanisms

    stem = name.replace("-", "_")
    if (
        not stem.isidentifier()
        or stem != stem.lower()
        or stem.startswith("_")
        or keyword.iskeyword(stem)
        or "_" in name
    ):
        hint = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
        raise ValueError(
            f"new: a name is lower-case letters, digits and hyphens and starts with a letter, got {name!r}"
            + (f"; try {hint}" if hint and hint != name and hint[0].isalpha() else "")
        )
    if name in mechanisms.names():
        raise ValueError(f"new: there is a mechanism {name} already: {inspect.getfile(mechanisms.get(name))}")
    if folder is None:
        folder = Path(mechanisms.__file__).parent
        if not (folder.parents[1] / "pyproject.toml").exists():
            raise ValueError("new: farfield is installed, not a checkout; say where to write with --folder DIR")
    words = stem.split("_")
    text = (Path(__file__).parent / "template.py").read_text(encoding="utf-8")
    text = text.replace('"""Example:', f'"""{" ".join(words).capitalize()}:', 1)
    text = text.replace("class Example(", f"class {''.join(w.capitalize() for w in words)}(", 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.py"
    if path.exists():
        raise ValueError(f"new: there is a file {path} already; take another name, or delete it")
    path.write_text(text, encoding="utf-8")
    return path


def table_markdown() -> str:
    """The text of MECHANISMS.md."""
    from farfield import mechanisms

    lines = [
        "# Mechanisms",
        "",
        "Written by `farfield list --markdown > MECHANISMS.md`; do not edit. `farfield show NAME` tells more.",
        "",
        "| name | idea | paper | can |",
        "| --- | --- | --- | --- |",
    ]
    for name in mechanisms.names():
        kind = mechanisms.get(name)
        paper = kind.paper
        title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.title
        link = f"[{name}](farfield/mechanisms/{name.replace('-', '_')}.py)"
        cells = (link, idea(kind), f"{title}, {paper.authors} {paper.year}", ", ".join(able(kind.supports)))
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def able(supports: Supports) -> list[str]:
    """What a mechanism can do, in words."""
    words = {
        "causal": "causal",
        "noncausal": "noncausal",
        "cross": "cross-attention",
        "training": "training",
        "decode": "decoding from a state",
        "grouped": "grouped heads",
        "packed": "packed documents",
    }
    return [word for name, word in words.items() if getattr(supports, name)] + [
        f"{d}-D" for d in supports.dims if d != 1
    ]


def idea(kind: type[Mechanism]) -> str:
    """The first paragraph of the mechanism's description, in one line."""
    return " ".join(describe(kind).partition("\n\n")[0].split())


def defaults(kind: type[Mechanism]) -> dict[str, object]:
    """The constructor's options and their defaults."""
    return {p.name: p.default for p in inspect.signature(kind).parameters.values()}


def draw(mechanism: Mechanism, tokens: int, path: Path) -> None:
    """Draw the layouts that `mechanism.layouts(tokens)` returns by name, side by side, into `path`.

    Raises:
        NotImplementedError: the mechanism has no `layouts`.
        ValueError: matplotlib does not write this kind of file.
    """
    offered = getattr(mechanism, "layouts", None)
    if offered is None:
        raise NotImplementedError(f"{mechanism.name}: offers no layout picture (its class has no method `layouts`)")
    from matplotlib.figure import Figure

    from farfield.bench.plots import save

    if path.suffix.lstrip(".").lower() not in ("", *Figure().canvas.get_supported_filetypes()):
        raise ValueError(f"show: --plot takes .svg, .png, .pdf or another ending that matplotlib writes, got {path}")
    layouts = offered(tokens)
    figure = Figure(figsize=(4.5 * len(layouts), 4.5), layout="constrained")
    for n, (title, layout) in enumerate(layouts.items(), start=1):
        layout.plot(figure.add_subplot(1, len(layouts), n)).set_title(title)
    figure.suptitle(f"{mechanism.name}, {tokens:,} tokens")
    save(figure, path)


def _names() -> tuple[str, ...]:
    from farfield import mechanisms

    return mechanisms.names()


def _print_table(names) -> None:
    from rich.console import Console
    from rich.table import Table

    from farfield import mechanisms

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True, style="cyan")
    table.add_column("paper", overflow="fold", ratio=3)
    table.add_column("year", no_wrap=True)
    table.add_column("arXiv", no_wrap=True)
    table.add_column("can", overflow="fold", ratio=2)
    for name in names:
        kind = mechanisms.get(name)
        table.add_row(
            name, kind.paper.title, str(kind.paper.year), kind.paper.arxiv or "", ", ".join(able(kind.supports))
        )
    Console(highlight=False).print(table)


def describe(kind: type[Mechanism]) -> str:
    """The docstring of the mechanism's file, or else of its class."""
    module = inspect.getmodule(kind)
    return inspect.cleandoc((module and module.__doc__) or kind.__doc__ or "")


def _text(name: str) -> str:
    """What `find` searches."""
    from farfield import mechanisms

    kind = mechanisms.get(name)
    paper = kind.paper
    return " ".join([name, paper.title, paper.authors, str(paper.year), paper.arxiv or "", describe(kind)]).lower()
