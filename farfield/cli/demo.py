"""demo: train, measure and sample on this machine, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farfield.cli.options import examples, number, parse, unset

EXAMPLES = examples(
    "farfield demo",
    "farfield demo --minutes 2 --out runs/short",
    "farfield demo --seed 1 --set layers=4 --set width=192 --minutes 20",
)


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("demo", rich_help_panel=panel, epilog=EXAMPLES)(demo)


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of everything made; numbered where it holds something already.")
    ] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="For everything.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order of the text and sample.")] = 0,
    tokens: Annotated[str | None, unset("2k", "Sequence length.", "--tokens", "-n", metavar="N")] = None,
    steps: Annotated[int | None, unset("as many as the time allows", "Training steps of each model.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another field of farfield.bench.demo.Settings: width=192."),
    ] = None,
) -> None:
    """Train fma, window and full attention on Python's own source, measure them, write a report."""
    from dataclasses import fields

    from farfield.bench.demo import Settings
    from farfield.bench.demo import demo as run
    from farfield.nn.config import known

    settings = parse(setting, "--set", "--set width=192")
    known(Settings, settings)
    settings |= {} if tokens is None else {"tokens": number(tokens, "--tokens")}
    settings |= {} if steps is None else {"steps": steps}
    named = {"minutes": minutes, "seed": seed}
    if twice := settings.keys() & named:
        raise ValueError(f"demo: give --{min(twice)}, not --set {min(twice)}=...")
    tuples = {f.name for f in fields(Settings) if str(f.type).startswith("tuple")}
    settings |= {name: tuple(value) for name, value in settings.items() if name in tuples}
    run(out, **named, **settings)
