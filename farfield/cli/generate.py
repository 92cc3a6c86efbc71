"""generate: text from a checkpoint."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from farfield.cli.options import examples, unset

EXAMPLES = examples(
    "farfield generate runs/book --prompt 'It was a'",
    "farfield generate runs/book --prompt-file long.txt --tokens 500 --temperature 0.7 --top-p 0.9 --seed 1",
    "cat long.txt | farfield generate runs/book --prompt-file - --echo",
)


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("generate", rich_help_panel=panel, epilog=EXAMPLES)(generate)


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, or one of its steps.")],
    prompt: Annotated[str | None, unset("a line end", "Text to continue.", "--prompt", "-p", metavar="TEXT")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to continue, from a file; - is standard input.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=0, help="New tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, unset("all", "Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, unset("all", "Draw from the likeliest tokens of this joint probability.")] = None,
    seed: Annotated[int | None, unset("another each time", "Of the draws.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens a forward.")] = 2048,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt as well.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the text.")] = False,
) -> None:
    """Continue a prompt, streaming: the prompt in chunks, then token by token, from fixed buffers where there are."""
    from farfield.nn import Decoder
    from farfield.train import generate as sample
    from farfield.train import load_codec, load_model, stream_text

    text = read_prompt(prompt, prompt_file)
    codec = load_codec(checkpoint)
    model, _ = load_model(checkpoint, device=device)
    if not isinstance(model, Decoder):
        raise ValueError(f"generate: {checkpoint} is an encoder; only a decoder generates text")
    ids = codec.encode(text)
    # refuses what is out of range before anything is printed
    drawn = sample(
        model, ids.tolist(), new_tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        chunk=chunk, dtype=dtype,
    )  # fmt: skip
    made = 0
    started = begun = last = time.perf_counter()

    def counted():
        nonlocal made, begun, last
        for token in drawn:
            last = time.perf_counter()
            begun = begun if made else last
            made += 1
            yield token

    if echo:
        typer.echo(text, nl=False)
    try:
        for piece in stream_text(codec, counted()):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    finally:
        typer.echo()
    if not quiet:
        rate = f", then {(made - 1) / (last - begun):.1f} a second" if made > 1 else ""
        typer.echo(f"{len(ids):,} + {made:,} tokens: the first after {begun - started:.2f} s{rate}", err=True)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt of --prompt or --prompt-file; "\\n" without either.

    Raises:
        ValueError: both, or an empty one.
        FileNotFoundError: no such file.
    """
    if prompt is not None and file is not None:
        raise ValueError("generate: give --prompt or --prompt-file, not both")
    if file is not None:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        prompt = raw.decode(errors="replace")
        if not prompt:
            raise ValueError(f"generate: {'standard input' if str(file) == '-' else file} is empty")
    if prompt == "":
        raise ValueError("generate: the prompt is empty; it needs at least one token")
    return "\n" if prompt is None else prompt
