"""The command line: `farfield`, or `python -m farfield`."""

from __future__ import annotations

from typing import Annotated

import typer

from farfield.cli import bench, budget, compare, demo, evaluate, generate, mechanisms, perplexity, recall, train
from farfield.cli.errors import Commands

__all__ = ["app", "main"]

app = typer.Typer(
    name="farfield",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long-context attention: train, evaluate, generate and measure.",
    epilog="Each command has examples: farfield train --help",
)


def _version(wanted: bool) -> None:
    if wanted:
        import platform

        import torch

        import farfield

        typer.echo(f"farfield {farfield.__version__}, torch {torch.__version__}, python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FARFIELD_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and stop.")
    ] = False,
) -> None:
    pass


for module, panel in (
    (demo, "Models"),
    (train, "Models"),
    (evaluate, "Models"),
    (generate, "Models"),
    (compare, "Mechanisms"),
    (recall, "Mechanisms"),
    (perplexity, "Mechanisms"),
    (budget, "Mechanisms"),
    (bench, "Mechanisms"),
    (mechanisms, "Mechanisms"),
):
    module.register(app, panel)


def main() -> None:
    """Run the command line on sys.argv."""
    app(prog_name="farfield")
