"""perplexity: a pretrained model of Hugging Face Transformers with other attention, on one long text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.cli.options import chosen, examples, number, unset

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = examples(
    "farfield perplexity --model models/llama --text book.txt -n 8k -a full,window:width=512,fma:sinks=4",
    "farfield perplexity --model models --gguf small.gguf --text book.txt.xz -a full,fma:sinks=4,open=8 "
    "--full-layers 0,1",
)

LETTERS = 16  # characters a token that are surely enough text


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("perplexity", rich_help_panel=panel, epilog=EXAMPLES)(perplexity)


def perplexity(
    model: Annotated[str, typer.Option(metavar="PATH_OR_NAME", help="As AutoModelForCausalLM.from_pretrained has it.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to predict; .gz, .bz2 and .xz are read through.")],
    attention: Annotated[
        str,
        typer.Option(
            "--attention", "-a", metavar="NAME,NAME:OPTION=VALUE,...", help="Mechanisms, each in every layer."
        ),
    ] = "full,window,fma:sinks=4",
    gguf: Annotated[
        str | None, unset("none", "File of the model's folder to read weights from.", metavar="FILE")
    ] = None,
    context: Annotated[str, typer.Option("--context", "-n", metavar="N", help="Tokens of the window.")] = "8192",
    start: Annotated[int, typer.Option(min=0, help="Character of the text that the window begins with.")] = 0,
    last: Annotated[str, typer.Option(metavar="N", help="Also the perplexity of so many tokens at the end.")] = "2048",
    full_layers: Annotated[
        str | None,
        unset("none", "Layers that keep full attention, from 0, or from -1 backwards.", metavar="N,N,..."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights and activations.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the records.")] = Path("results"),
    record: Annotated[bool, typer.Option("--record/--no-record", help="Append to the records.")] = True,
) -> None:
    """Measure a pretrained model's perplexity with each mechanism in place of its attention, untrained."""
    import torch
    from rich.console import Console

    from farfield import hf
    from farfield.bench import records
    from farfield.bench.compare import Entry
    from farfield.train.config import pick_device

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype}")
    entries = [Entry(*each) for each in chosen(attention, "--attention")]
    kept = _layers(full_layers)
    tokens, end, where = number(context, "--context"), number(last, "--last"), pick_device(device)
    if end >= tokens:
        raise ValueError(f"--last must be less than --context {tokens}, got {end}")
    notes = Console(stderr=True, highlight=False)
    with notes.status(f"loading {model}"):
        pretrained, ids = _load(model, gguf, text, start, tokens, getattr(torch, dtype))
        pretrained = pretrained.to(where).eval()
    path = records.results_path("perplexity", out, where)
    print(f"{'perplexity':>10}  {f'last {end:,}':>10}  {'rows':>7}  {'of n':>6}  attention", flush=True)
    for entry in entries:
        with notes.status(entry.label):
            hf.use(pretrained, entry.name, entry.options, layers=dict.fromkeys(kept, "full"))
            found = hf.perplexity(pretrained, ids)
        rows = [x.rows_read(tokens) for x in hf.in_use(pretrained)]
        known = [x for x in rows if x is not None]
        mean = sum(known) / len(known) if len(known) == len(rows) else None
        count, share = ("-", "-") if mean is None else (f"{mean:,.0f}", f"{mean / tokens:.1%}")
        print(f"{found.over():10.3f}  {found.over(end):10.3f}  {count:>7}  {share:>6}  {entry.label}", flush=True)
        if record:
            params = {
                "tokens": tokens, "model": gguf or Path(model).name, "text": text.name, "start": start,
                "attention": entry.name, "options": dict(entry.options), "full_layers": list(kept), "last": end,
            }  # fmt: skip
            rates = {"perplexity": found.over(), "perplexity_last": found.over(end)}
            rates |= {} if mean is None else {"rows": mean}
            records.append(
                path,
                records.Record(
                    "perplexity", entry.label, "forward", dtype, params, rates=rates, env=records.environment(where)
                ),
            )


def _layers(given: str | None) -> list[int]:
    try:
        return [int(x) for x in given.split(",")] if given else []
    except ValueError:
        raise ValueError(
            f"--full-layers takes whole numbers with commas between, such as 0,1,-1; got {given}"
        ) from None


def _load(model: str, gguf: str | None, text: Path, start: int, tokens: int, dtype) -> tuple[Any, Tensor]:
    """The model, and the ids of the window."""
    for library in ("transformers", *(("gguf", "accelerate") if gguf else ())):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"perplexity needs {library}: pip install 'farfield[hf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    written = _read(text)[start : start + LETTERS * tokens]
    options = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    ids: Tensor = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"][0][:tokens]
    if len(ids) < tokens:
        raise ValueError(f"text shorter than n: {len(ids):,} tokens from character {start:,} on, {tokens:,} are needed")
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options), ids


def _read(path: Path) -> str:
    from farfield.train.data import OPENERS

    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        return file.read()
