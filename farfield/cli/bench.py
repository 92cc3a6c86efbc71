"""bench: time a mechanism against its baseline and record every point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farfield.cli.options import examples, numbers, parse, unset

EXAMPLES = examples(
    "farfield bench --list",
    "farfield bench fma --device cpu",
    "farfield bench fma --tokens 4096,16384 --dtype float32 --passes forward --option rank=16",
    "farfield bench window --tokens 1k,2k,4k --no-record",
    "farfield bench attend-random --device cuda -o density=0.1",
)


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("bench", rich_help_panel=panel, epilog=EXAMPLES)(bench)


def bench(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A benchmark or a mechanism.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the names of the benchmarks and stop.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "cpu",
    tokens: Annotated[str | None, unset("the benchmark's", "Sequence lengths; 4k is 4096.", metavar="N,N,...")] = None,
    dtype: Annotated[list[str] | None, unset("the benchmark's", "May be repeated.", metavar="DTYPE")] = None,
    passes: Annotated[
        list[str] | None,
        unset("the benchmark's", "forward, backward or forward+backward; may be repeated.", metavar="PASSES"),
    ] = None,
    against: Annotated[
        list[str] | None, unset("all of the benchmark's", "A baseline, or none; may be repeated.", metavar="NAME")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the benchmark.")
    ] = None,
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
            max_baseline_seconds=math.inf if longest is None else longest,
            out=out if record else None,
            progress=status.update,
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
