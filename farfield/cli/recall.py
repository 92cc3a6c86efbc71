"""recall: the same small model with several mechanisms, trained to find things again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    steps: Annotated[int | None, typer.Option(min=1, show_default=False, help="Steps of each run, or")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", show_default=False, help="tokens of each run: 100m,")
    ] = None,
    minutes: Annotated[float | None, unset(2, "or minutes of the slowest run; the others get as many steps.")] = None,
    batch: Annotated[int | None, unset(16, "Samples a step.")] = None,
    width: Annotated[int | None, unset("64; 256 on a GPU", "Width of the residual stream.")] = None,
    layers: Annotated[int | None, unset("2; 4 on a GPU", "Blocks.")] = None,
    heads: Annotated[int | None, unset("2; 4 on a GPU", "Query heads.")] = None,
    kv_heads: Annotated[int | None, unset("as many as heads", "Key and value heads.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each mechanism.")] = 1,
    seeds_of: Annotated[
        str | None, unset("all", "Mechanisms that get more than one seed, as in --attention.", metavar="NAME,...")
    ] = None,
    scored: Annotated[int | None, unset(64, "Test samples at each length.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other field of ModelConfig: conv=0.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other field of TrainConfig: lr=0.02.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs: each takes the next run when it is free.")] = 1,
    dtype: Annotated[str | None, unset("float32; bfloat16 on a GPU", "float32, or bfloat16 for autocast.")] = None,
    compile: Annotated[
        bool | None,
        unset("no-compile", "torch.compile the blocks around the mechanisms.", "--compile/--no-compile"),
    ] = None,
    graph: Annotated[bool | None, unset("no-graph", "Take a step as one CUDA graph.", "--graph/--no-graph")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of everything made.")] = Path("runs/recall"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds: finished runs are kept.")
    ] = False,
    limit: Annotated[float | None, unset("none", "End a run that takes longer, on a GPU.", metavar="SECONDS")] = None,
    deadline: Annotated[
        float | None, unset("none", "End training then; what was trained is scored, marked as cut.", metavar="SECONDS")
    ] = None,
) -> None:
    """Train the same model with each mechanism to recall: right answers by length and distance, speed, memory, rows."""
    import math

    from farfield.bench.compare import Entry
    from farfield.bench.recall import OPTIONS, SHAPES, RecallSettings
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
    again = tuple(Entry(*each).label for each in mixed(seeds_of, "--seeds-of")) if seeds_of else ()
    settings = RecallSettings(
        **SHAPES[kind] | {k: x for k, x in given.items() if x is not None},
        task=task, options=OPTIONS[kind].get(task, {}) | parse(option), seeds=seeds, again=again,
        model=parse(model, "--model"), train=parse(recipe, "--recipe"),
    )  # fmt: skip
    run(
        mixed(attention, "--attention"), settings, out=out, device=where, resume=resume,
        limit=math.inf if limit is None else limit,
        gpus=gpus, deadline=math.inf if deadline is None else deadline,
    )  # fmt: skip
