"""evaluate: how well a checkpoint predicts text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farfield.cli.options import examples, number, parse, unset

if TYPE_CHECKING:
    from farfield.train import Codec, Split
    from farfield.train.checkpoint import Checkpoint

EXAMPLES = examples(
    "farfield evaluate runs/book",
    "farfield evaluate runs/book other.txt --tokens 8192",
    "farfield evaluate runs/book --tokens 65536 --model log_scale=8192",
    "farfield evaluate runs/book/step-000500 --copy-probe --json > result.json",
)


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("evaluate", rich_help_panel=panel, epilog=EXAMPLES)(evaluate)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, or one of its steps.")],
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT...", help="Files, folders or globs. Default: what the run held out."),
    ] = None,
    tokens: Annotated[
        str | None, unset("as trained", "Sequence length; 4k is 4096.", "--tokens", "-n", metavar="N")
    ] = None,
    windows: Annotated[int | None, unset("all", "Windows read, spread evenly over the text.", min=1)] = None,
    batch: Annotated[int | None, unset("about 16k tokens", "Windows a forward.", min=1)] = None,
    copy_probe: Annotated[
        bool, typer.Option("--copy-probe", help="Also: does the model copy strings seen once?")
    ] = False,
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME=VALUE", help="Field of ModelConfig to change; repeat.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure bits per byte: overall, by position and by distance to the last repeat."""
    from rich.console import Console

    from farfield.nn import Decoder
    from farfield.train import checkpoint as checkpoints
    from farfield.train import copy_probe as probe
    from farfield.train import evaluate as measure

    length = None if tokens is None else number(tokens, "--tokens")
    found = checkpoints.read(checkpoint)
    changes = parse(model, "--model", "--model log_scale=8192")
    trained, _ = checkpoints.load_model(found.path, device=device, changes=changes)
    if copy_probe and not isinstance(trained, Decoder):
        raise ValueError("evaluate: the copy probe needs a decoder, and this checkpoint is an encoder")
    split = open_text(found, checkpoints.load_codec(found.path), text, length)
    console = Console(stderr=True)
    with console.status(f"{min(windows or split.windows, split.windows):,} windows of {split.tokens:,} tokens"):
        result = measure(trained, split, windows=windows, batch=batch, dtype=dtype, mask_share=found.train.mask_share)
        copied = probe(trained, split, dtype=dtype) if isinstance(trained, Decoder) and copy_probe else None
    if as_json:
        about = {"checkpoint": str(found.path), "step": found.step, "attention": trained.config.attention}
        about |= {"changes": changes} if changes else {}
        typer.echo(json.dumps(about | result.to_dict() | ({} if copied is None else {"copy_probe": copied}), indent=1))
        return
    _print(result, copied)


def open_text(found: Checkpoint, codec: Codec, text: list[str] | None, tokens: int | None) -> Split:
    """All of `text`, or what the run held out, in windows of `tokens`.

    Raises:
        FileNotFoundError, ValueError: no such text, or less than a window of it.
    """
    from farfield.train import Split, checkpoint, open_data
    from farfield.train.data import tokenize

    config = found.train
    tokens = tokens or config.tokens
    if not text:
        tokenizer = found.path / checkpoint.TOKENIZER if config.tokenizer else None
        return open_data(
            config.text, tokens=tokens, valid=config.valid, held_out=config.held_out, tokenizer=tokenizer,
            cache=config.cache,
        ).valid  # fmt: skip
    ids, sizes, _ = tokenize(text, codec, cache=config.cache)
    split = Split(ids, sizes, tokens)
    if not split.windows:
        raise ValueError(
            f"evaluate: the text is too short: {len(ids):,} tokens, but a window of {tokens:,} needs {tokens + 1:,}. "
            f"Give more text{f', or --tokens {len(ids) - 1} or fewer' if len(ids) > 1 else ''}."
        )
    return split


def _print(result, copied) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"[bold]{result.bits_per_byte:.4f} bits/byte[/] over {result.bytes:,} bytes in {result.windows:,} windows of "
        f"{result.length:,} tokens; early {result.early:.4f}, late {result.late:.4f}",
        soft_wrap=True,
    )
    for title, buckets in (("position", result.by_position), ("last repeat", result.by_repeat)):
        if not buckets:
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(title, no_wrap=True, min_width=12)
        table.add_column("bits/byte", justify="right")
        table.add_column("share", justify="right")
        for b in buckets:
            table.add_row(b.name, f"{b.bits_per_byte:.4f}" if b.share else "-", f"{b.share:.1%}")
        console.print()
        console.print(table)
    if copied is None:
        return
    console.print()
    if not copied:
        return console.print("copy probe: no probe fits into a window; use more --tokens")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("copied", "distance", "first, bits/token", "second"):
        table.add_column(column, justify="left" if column == "copied" else "right")
    for p in copied:
        table.add_row(f"{p['kind']} {p['length']}", f"{p['distance']:,}", f"{p['first']:.2f}", f"{p['second']:.2f}")
    console.print(table)
