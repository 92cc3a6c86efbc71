"""bench: time a mechanism against its baseline and record every point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farfield.cli.options import chosen, examples, numbers, parse, unset

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = examples(
    "farfield bench --list",
    "farfield bench fma --device cpu",
    "farfield bench fma --tokens 4096,16384 --dtype float32 --passes forward --option rank=16",
    "farfield bench window --tokens 1k,2k,4k --no-record",
    "farfield bench attend-random --device cuda -o density=0.1",
    "farfield bench mechanisms --device cuda --seconds 1 --resume",
    "farfield bench mechanisms --only fma,window:width=512,nsa --tokens 8k,32k --width 64",
)


ALL = "bench mechanisms only"


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("bench", rich_help_panel=panel, epilog=EXAMPLES)(bench)


def bench(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A benchmark or a mechanism.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the names of the benchmarks and stop.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "cpu",
    tokens: Annotated[str | None, unset("the benchmark's", "Sequence lengths; 4k is 4096.", metavar="N,N,...")] = None,
    dtype: Annotated[list[str] | None, unset("the benchmark's", "May be repeated.", "--dtype", metavar="DTYPE")] = None,
    passes: Annotated[
        list[str] | None,
        unset(
            "the benchmark's", "forward, backward or forward+backward; may be repeated.", "--passes", metavar="PASSES"
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        unset("all of the benchmark's", "A baseline, or none; may be repeated.", "--against", metavar="NAME"),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the benchmark.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME:OPTION=VALUE,...",
            rich_help_panel=ALL,
            show_default=False,
            help="These mechanisms, by names that may be cut short, with options. [dim]\\[default: all][/]",
        ),
    ] = None,
    width: Annotated[
        str | None, unset("64,128 on a GPU", "Head widths d.", metavar="N,N,...", rich_help_panel=ALL)
    ] = None,
    heads: Annotated[int | None, unset("16 on a GPU", "Query heads.", rich_help_panel=ALL)] = None,
    kv_heads: Annotated[
        int | None, unset("4 where the paper groups heads", "Key and value heads.", rich_help_panel=ALL)
    ] = None,
    limit: Annotated[
        float, typer.Option(metavar="SECONDS", rich_help_panel=ALL, help="A point may take so long, on a GPU.")
    ] = 120.0,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=ALL, help="Measure only what the records lack.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for the rounds of one point, all contenders.")] = 5.0,
    longest: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Skip a baseline whose single call is expected to take longer."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where records and plots go.")] = Path("results"),
    record: Annotated[bool, typer.Option("--record/--no-record", help="Append to the records and redraw.")] = True,
) -> None:
    """Time a benchmark against its baseline: check, time interleaved, read memory, record, draw."""
    import math

    from rich.console import Console

    from farfield.bench import mechanisms as all_mechanisms
    from farfield.bench import plots, records, runner, tables
    from farfield.train.config import pick_device

    console = Console(highlight=False)
    if list_:
        for each in runner.names():
            console.print(f"[cyan]{each}[/]  {runner.get(each).about}")
        return
    if name is None:
        raise ValueError(f"bench: name a benchmark; there are {', '.join(runner.names())}")
    device = str(pick_device(device))
    given = {"only": only, "width": width, "heads": heads, "kv_heads": kv_heads, "resume": resume or None}
    if name == all_mechanisms.NAME:
        if option:
            raise ValueError(f"bench {name}: options are given to a mechanism, as in --only fma:rank=8")
        longest_call = math.inf if longest is None else longest
        run_mechanisms(
            console, device, tokens, dtype, passes, against, out if record else None, only=only, width=width,
            heads=heads, kv_heads=kv_heads, limit=limit, resume=resume, seconds=seconds, longest=longest_call,
        )  # fmt: skip
        return
    if wrong := [x for x, value in given.items() if value is not None]:
        raise ValueError(
            f"bench {name}: --{wrong[0].replace('_', '-')} is for bench mechanisms; use --option NAME=VALUE"
        )
    grid = parse(option)
    if tokens is not None:
        grid["tokens"] = numbers(tokens, "--tokens")
    with console.status("") as status:
        made = runner.run(
            name,
            device=device,
            dtypes=tuple(dtype) if dtype else None,
            passes=tuple(passes) if passes else None,
            against=None if against is None else tuple(x for x in against if x != "none"),
            seconds=seconds,
            max_baseline_seconds=longest,
            out=out if record else None,
            progress=status.update if console.is_terminal else _say,
            **grid,
        )
    title = f"{name}, {records.machine_name(device)}"
    if tables.plain(made):
        console.print(tables.table(made, title))
    else:
        # as wide as it is: a file or a pager scrolls
        Console(highlight=False, width=max(console.width, 200)).print(tables.points(made, title))
    for note in tables.notes(made):
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    for (who, which, kind), slope in runner.memory_slopes(made).items() if tables.plain(made) else ():
        console.print(f"memory of {who}, {which} {kind}: grows as n^{slope:.2f}", style="dim")
    if record:
        path = records.results_path(name, out, device)
        console.print(f"records  {path}", soft_wrap=True)
        everything = records.latest(records.load(path))
        axis = runner.get(name).axis
        figures = plots.time_figure(everything, axis=axis), plots.memory_figure(everything, axis=axis)
        for what, figure in zip(("time", "memory"), figures, strict=True):
            console.print(f"{what:<8} {plots.save(figure, path.with_name(f'{path.stem}-{what}.svg'))}", soft_wrap=True)
    if any(r.status == "failed" and r.contender == r.bench for r in made):
        raise typer.Exit(1)


def _say(what: str) -> None:
    """Progress where no line can be rewritten."""
    print(what, file=sys.stderr, flush=True)


def run_mechanisms(
    console: Console, device: str, tokens: str | None, dtype: list[str] | None, passes: list[str] | None,
    against: list[str] | None, out: Path | None, *, only: str | None, width: str | None, heads: int | None,
    kv_heads: int | None, limit: float, resume: bool, seconds: float, longest: float,
) -> None:  # fmt: skip
    """Every mechanism, or those chosen: the table, the records, the figure. One that fails does not end the run."""
    import torch
    from rich.console import Console

    from farfield import mechanisms as registry
    from farfield.bench import mechanisms, plots, records, tables

    usual = mechanisms.GRIDS["cuda" if torch.device(device).type == "cuda" else "cpu"]
    which = chosen(only, "--only") if only else [(name, {}) for name in registry.names()]
    plan = mechanisms.Plan(
        tokens=numbers(tokens, "--tokens") if tokens else usual["tokens"],
        width=numbers(width, "--width") if width else usual["width"],
        heads=heads or usual["heads"],
        kv_heads=kv_heads,
        dtypes=dtype or usual["dtypes"],
        passes=passes or mechanisms.PASSES,
    )
    with console.status("") as status:
        made = mechanisms.run_all(
            which,
            plan,
            device=device,
            against=None if against is None else [x for x in against if x != "none"],
            seconds=seconds,
            max_baseline_seconds=longest,
            limit=limit,
            resume=resume,
            out=out,
            progress=status.update if console.is_terminal else _say,
        )
    # as wide as it is: a file or a pager scrolls
    wide = Console(highlight=False, width=max(console.width, 180))
    wide.print(tables.mechanisms(made, f"mechanisms, {records.machine_name(device)}"))
    for note in tables.notes(made):
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    if out is not None:
        path = records.results_path(mechanisms.NAME, out, device)
        console.print(f"records  {path}", soft_wrap=True)
        everything = records.latest(records.load(path))
        if any(r.times for r in everything):
            drawn = plots.save(plots.mechanisms_figure(everything), path.with_name(f"{path.stem}-time.svg"))
            console.print(f"time     {drawn}", soft_wrap=True)
