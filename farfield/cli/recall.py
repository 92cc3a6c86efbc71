"""recall: the same small model with several mechanisms, trained to find things again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farfield.cli import runs
from farfield.cli.options import examples, mixed, number, numbers, parse, unset

EXAMPLES = examples(
    "farfield recall --attention full,window:width=32 --steps 300",
    "farfield recall --task mqar -o pairs=64 -o nearest=256 --attention full,window,fma:near=128,rank=16 "
    "--train-length 4096 --test-lengths 4k,16k,64k --seeds 2",
    "farfield recall --task passkey -o digits=8 --attention full,fma,nsa --minutes 5 --out runs/passkey",
)


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("recall", rich_help_panel=panel, epilog=EXAMPLES)(recall)


def recall(
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            "-a",
            metavar="NAME,NAME:OPTION=VALUE,...",
            help="Mechanisms, by names that may be cut short.",
        ),
    ],
    task: Annotated[
        str, typer.Option(help="mqar: keys asked for their values; passkey: a key hidden in filler.")
    ] = "mqar",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Of the task: vocab, pairs, exponent, nearest; digits, depth. May be repeated.",
        ),
    ] = None,
    train_length: Annotated[str | None, unset("256; 4096 on a GPU", "Tokens of a training sample.")] = None,
    test_lengths: Annotated[
        str | None, unset("256,512,1k; 4k,16k,64k on a GPU", "Tokens of test samples.", metavar="N,...")
    ] = None,
    steps: runs.Steps = None,
    tokens: runs.Tokens = None,
    minutes: Annotated[float | None, unset(2, "or minutes of the slowest run; the others get as many steps.")] = None,
    batch: Annotated[int | None, unset(16, "Samples a step.")] = None,
    width: Annotated[int | None, unset("64; 256 on a GPU", "Width of the residual stream.")] = None,
    layers: Annotated[int | None, unset("2; 4 on a GPU", "Blocks.")] = None,
    heads: Annotated[int | None, unset("2; 4 on a GPU", "Query heads.")] = None,
    kv_heads: runs.KvHeads = None,
    seeds: runs.Seeds = 1,
    seeds_of: runs.SeedsOf = None,
    scored: Annotated[int | None, unset(64, "Test samples at each length.")] = None,
    model: runs.ModelFields = None,
    recipe: runs.RecipeFields = None,
    device: runs.Device = "auto",
    gpus: runs.Gpus = 1,
    dtype: runs.Dtype = None,
    compile: runs.Compile = None,
    graph: runs.Graph = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of everything made.")] = Path("runs/recall"),
    resume: runs.Resume = False,
    limit: runs.Limit = None,
    deadline: runs.Deadline = None,
) -> None:
    """Train the same model with each mechanism to recall: right answers by length and distance, speed, memory, rows."""
    from farfield.bench.recall import NAME, OPTIONS, SHAPES, RecallSettings
    from farfield.bench.recall import recall as run
    from farfield.train.config import pick_device

    where = pick_device(device)
    kind = "cuda" if where.type == "cuda" else "cpu"
    if steps is None and tokens is None and minutes is None:
        minutes = 2.0
    length = None if train_length is None else number(train_length, "--train-length")
    # lengths of its own to train on are tested on, unless others are given
    lengths = () if test_lengths is None else tuple(numbers(test_lengths, "--test-lengths"))
    given = {
        "steps": steps, "minutes": minutes, "batch": batch, "width": width, "layers": layers, "heads": heads,
        "kv_heads": kv_heads, "scored": scored, "dtype": dtype, "compile": compile, "graph": graph, "length": length,
        "tokens": None if tokens is None else number(tokens, "--tokens"),
        "lengths": None if test_lengths is None and length is None else lengths,
    }  # fmt: skip
    settings = RecallSettings(
        **SHAPES[kind] | {k: x for k, x in given.items() if x is not None},
        task=task, options=OPTIONS[kind].get(task, {}) | parse(option), seeds=seeds, again=runs.labels(seeds_of),
        model=parse(model, "--model", "--model conv=0"), train=parse(recipe, "--recipe", "--recipe lr=0.02"),
    )  # fmt: skip
    page = run(
        mixed(attention, "--attention"), settings, out=out, device=where, resume=resume, gpus=gpus,
        **runs.until(limit, deadline),
    )  # fmt: skip
    runs.check(page.with_name(NAME))
