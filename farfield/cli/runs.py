"""Options of the commands that train the same model with several mechanisms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from farfield.cli.options import mixed, unset

Steps = Annotated[int | None, typer.Option(min=1, show_default=False, help="Steps of each run, or")]
Tokens = Annotated[str | None, typer.Option(metavar="N", show_default=False, help="tokens of each run: 100m,")]
KvHeads = Annotated[int | None, unset("as many as heads", "Key and value heads.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each mechanism.")]
SeedsOf = Annotated[
    str | None, unset("all", "Mechanisms that get more than one seed, as in --attention.", metavar="NAME,...")
]
ModelFields = Annotated[
    list[str] | None, typer.Option("--model", metavar="NAME=VALUE", help="Any other field of ModelConfig: conv=0.")
]
RecipeFields = Annotated[
    list[str] | None, typer.Option("--recipe", metavar="NAME=VALUE", help="Any other field of TrainConfig: lr=0.02.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs: each takes the next run when it is free.")]
Dtype = Annotated[str | None, unset("float32; bfloat16 on a GPU", "float32, or bfloat16 for autocast.")]
Compile = Annotated[
    bool | None, unset("no-compile", "torch.compile the blocks around the mechanisms.", "--compile/--no-compile")
]
Graph = Annotated[bool | None, unset("no-graph", "Take a step as one CUDA graph.", "--graph/--no-graph")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --out holds: finished runs are kept.")]
Limit = Annotated[float | None, unset("none", "End a run that takes longer, on a GPU.", metavar="SECONDS")]
Deadline = Annotated[
    float | None, unset("none", "End training then; what was trained is scored, marked as cut.", metavar="SECONDS")
]


def labels(seeds_of: str | None) -> tuple[str, ...]:
    """--seeds-of as the labels of the entries; none given is all."""
    from farfield.bench.compare import Entry

    return tuple(Entry(*each).label for each in mixed(seeds_of, "--seeds-of")) if seeds_of else ()


def until(limit: float | None, deadline: float | None) -> dict[str, Any]:
    """--limit and --deadline, infinite where they are not given."""
    given = {"limit": limit, "deadline": deadline}
    return {name: math.inf if seconds is None else seconds for name, seconds in given.items()}


def check(found: Path) -> None:
    """Exit with 1 where nothing could be trained, by compare.json or recall.json; the reasons have been printed."""
    if not json.loads(found.read_text(encoding="utf-8"))["runs"]:
        raise typer.Exit(1)
