"""perplexity: a pretrained model of Hugging Face Transformers with other attention, on one long text."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.cli.options import chosen, examples, number, unset
from farfield.cli.runs import Device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXAMPLES = examples(
    "farfield perplexity --model models/llama --text book.txt -n 8k -a full,window:width=512,fma:sinks=4",
    "farfield perplexity --model models --gguf small.gguf --text book.txt.xz -a full,fma:sinks=4,open=8 "
    "--full-layers 0,1",
)

# of budget as well
Pretrained = Annotated[
    str, typer.Option(metavar="PATH_OR_NAME", help="As AutoModelForCausalLM.from_pretrained has it.")
]
Weights = Annotated[str | None, unset("none", "File of the model's folder to read weights from.", metavar="FILE")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16, of weights and activations.")]

LETTERS = 16  # characters a token that are surely enough text


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("perplexity", rich_help_panel=panel, epilog=EXAMPLES)(perplexity)


def perplexity(
    model: Pretrained,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to predict; .gz, .bz2 and .xz are read through.")],
    attention: Annotated[
        str,
        typer.Option(
            "--attention", "-a", metavar="NAME,NAME:OPTION=VALUE,...", help="Mechanisms, each in every layer."
        ),
    ] = "full,window,fma:sinks=4",
    gguf: Weights = None,
    context: Annotated[str, typer.Option("--context", "-n", metavar="N", help="Tokens of the window.")] = "8192",
    start: Annotated[int, typer.Option(min=0, help="Character of the text that the window begins with.")] = 0,
    last: Annotated[str, typer.Option(metavar="N", help="Also the perplexity of so many tokens at the end.")] = "2048",
    full_layers: Annotated[
        str | None,
        unset("none", "Layers that keep full attention, from 0, or from -1 backwards.", metavar="N,N,..."),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        unset(
            "none",
            "Also a mechanism for each layer, as farfield budget plans it; repeatable.",
            "--plan",
            metavar="FILE",
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
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
    kept = _layers(full_layers)
    # how it is called, what is recorded of it, and what `use` is told
    entries: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for name, options in chosen(attention, "--attention"):
        about = {"attention": name, "options": options, "full_layers": kept}
        told = {"mechanism": name, "options": options, "layers": dict.fromkeys(kept, "full")}
        entries.append((Entry(name, options).label, about, told))
    for file in plan or ():
        layers = hf.read_plan(file)
        entries.append((file.name, {"attention": file.name, "layers": layers}, {"layers": layers}))
    tokens, end, where = number(context, "--context"), number(last, "--last"), pick_device(device)
    if end >= tokens:
        raise ValueError(f"--last must be less than --context {tokens}, got {end}")
    notes = Console(stderr=True, highlight=False)
    with notes.status(f"loading {model}"):
        pretrained, (ids,) = load(model, gguf, text, [start], tokens, getattr(torch, dtype))
        pretrained = pretrained.to(where).eval()
    path = records.results_path("perplexity", out, where)
    print(f"{'perplexity':>10}  {f'last {end:,}':>10}  {'rows':>7}  {'of n':>6}  attention", flush=True)
    for label, about, told in entries:
        with notes.status(label):
            hf.use(pretrained, **told)
            found = hf.perplexity(pretrained, ids)
        rows = [x.rows_read(tokens) for x in hf.in_use(pretrained)]
        known = [x for x in rows if x is not None]
        mean = sum(known) / len(known) if len(known) == len(rows) else None
        count, share = ("-", "-") if mean is None else (f"{mean:,.0f}", f"{mean / tokens:.1%}")
        print(f"{found.over():10.3f}  {found.over(end):10.3f}  {count:>7}  {share:>6}  {label}", flush=True)
        if record:
            params = {
                "tokens": tokens, "model": gguf or Path(model).name, "text": text.name, "start": start, **about,
                "last": end,
            }  # fmt: skip
            rates = {"perplexity": found.over(), "perplexity_last": found.over(end)}
            rates |= {} if mean is None else {"rows": mean, "rows_most": max(known)}
            env = records.environment(where)
            records.append(path, records.Record("perplexity", label, "forward", dtype, params, rates=rates, env=env))


def _layers(given: str | None) -> list[int]:
    try:
        return [int(x) for x in given.split(",")] if given else []
    except ValueError:
        raise ValueError(
            f"--full-layers takes whole numbers with commas between, such as 0,1,-1; got {given}"
        ) from None


def load(
    model: str, gguf: str | None, text: Path, starts: Sequence[int], tokens: int, dtype: torch.dtype
) -> tuple[Any, list[Tensor]]:
    """The model, and the ids of a window from each of these characters on.

    Raises:
        ValueError: a library is missing, or the text is too short.
    """
    for library in ("transformers", *(("gguf", "accelerate") if gguf else ())):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"perplexity needs {library}: pip install {library}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    written, windows = _read(text), []
    for start in starts:
        part = written[start : start + LETTERS * tokens]
        ids: Tensor = tokenizer(part, add_special_tokens=False, return_tensors="pt")["input_ids"][0][:tokens]
        if len(ids) < tokens:
            raise ValueError(
                f"text shorter than n: {len(ids):,} tokens from character {start:,} on, {tokens:,} are needed"
            )
        windows.append(ids)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options), windows


def _read(path: Path) -> str:
    from farfield.train.data import OPENERS

    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        return file.read()
