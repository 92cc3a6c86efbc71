"""compare: the same model with several mechanisms, for equal tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farfield.cli import runs
from farfield.cli.options import examples, mixed, number, numbers, parse, unset

EXAMPLES = examples(
    "farfield compare --attention full,window,fma --text book.txt --minutes 2",
    "farfield compare --attention fma,fma:rank=32,window:width=512 --text corpus/ --steps 2000 --seeds 2",
    "farfield compare --attention full,fma,window --text train.xz --tokens 100m --seeds 2 --seeds-of full,fma",
)


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("compare", rich_help_panel=panel, epilog=EXAMPLES)(compare)


def compare(
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            "-a",
            metavar="NAME,NAME:OPTION=VALUE,...",
            help="Mechanisms, by names that may be cut short; NAME/NAME: the second in every fourth layer.",
        ),
    ],
    text: Annotated[
        list[str], typer.Option("--text", metavar="TEXT", help="File, folder or glob to learn from; may be repeated.")
    ],
    valid: Annotated[
        list[str] | None,
        unset("the last 5 % of the text", "Held-out text; may be repeated.", "--valid", metavar="TEXT"),
    ] = None,
    steps: runs.Steps = None,
    tokens: runs.Tokens = None,
    minutes: Annotated[float | None, unset(2, "or minutes of the slowest run; the others get as many tokens.")] = None,
    length: Annotated[str | None, unset("2048; 8192 on a GPU", "Sequence length n.", "--length", "-n")] = None,
    lengths: Annotated[
        str | None, unset("none", "Other lengths that the trained models are scored at.", metavar="N,...")
    ] = None,
    batch: Annotated[int | None, unset("1; 4 on a GPU", "Sequences a step.")] = None,
    width: Annotated[int | None, unset("128; 512 on a GPU", "Width of the residual stream.")] = None,
    layers: Annotated[int | None, unset("3; 8 on a GPU", "Blocks.")] = None,
    heads: Annotated[int | None, unset("2; 8 on a GPU", "Query heads.")] = None,
    kv_heads: runs.KvHeads = None,
    seeds: runs.Seeds = 1,
    seeds_of: runs.SeedsOf = None,
    scored: Annotated[int | None, unset("16; 128 on a GPU", "Held-out windows.")] = None,
    model: runs.ModelFields = None,
    recipe: runs.RecipeFields = None,
    device: runs.Device = "auto",
    gpus: runs.Gpus = 1,
    dtype: runs.Dtype = None,
    compile: runs.Compile = None,
    graph: runs.Graph = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of everything made.")] = Path("runs/compare"),
    resume: runs.Resume = False,
    limit: runs.Limit = None,
    deadline: runs.Deadline = None,
) -> None:
    """Train the same model with each mechanism for equal tokens: bits per byte, speed, memory, rows read."""
    from farfield.bench.compare import NAME, SHAPES, Settings
    from farfield.bench.compare import compare as run
    from farfield.train.config import pick_device

    where = pick_device(device)
    if steps is None and tokens is None and minutes is None:
        minutes = 2.0
    given = {
        "steps": steps, "minutes": minutes, "batch": batch, "width": width, "layers": layers, "heads": heads,
        "kv_heads": kv_heads, "scored": scored, "dtype": dtype, "compile": compile, "graph": graph,
        "tokens": None if tokens is None else number(tokens, "--tokens"),
        "length": None if length is None else number(length, "--length"),
        "lengths": None if lengths is None else tuple(numbers(lengths, "--lengths")),
    }  # fmt: skip
    settings = Settings(
        **SHAPES["cuda" if where.type == "cuda" else "cpu"] | {k: x for k, x in given.items() if x is not None},
        seeds=seeds, again=runs.labels(seeds_of),
        model=parse(model, "--model", "--model conv=0"), train=parse(recipe, "--recipe", "--recipe lr=0.02"),
    )  # fmt: skip
    page = run(
        mixed(attention, "--attention"), text, settings, valid=valid, out=out, device=where, resume=resume, gpus=gpus,
        **runs.until(limit, deadline),
    )  # fmt: skip
    runs.check(page.with_name(NAME))
