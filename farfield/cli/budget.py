"""budget: a mechanism for each layer of a pretrained model, by what each layer loses with each."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.cli.options import chosen, examples, number
from farfield.cli.perplexity import Dtype, Pretrained, Weights, load
from farfield.cli.runs import Device

if TYPE_CHECKING:
    from farfield.hf import Loss

EXAMPLES = examples(
    "farfield budget --model models/llama --text other-book.txt -n 8k --rows 10% --out plan.json "
    "-a near-field:sinks=4,fma:sinks=4,score=mean --vary open=4,8,16,32,64",
    "farfield budget --model models/llama --text other-book.txt -n 8k --rows 5% --out plan.json",
    "farfield perplexity --model models/llama --text book.txt -n 8k -a full --plan plan.json",
)


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("budget", rich_help_panel=panel, epilog=EXAMPLES)(budget)


def budget(
    model: Pretrained,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to measure on, other than what is tested on.")],
    rows: Annotated[
        str, typer.Option(metavar="N|P%", help="Rows that a query may read, mean over layers; % of the tokens.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The plan, and all that was measured; if it is there, goes on with it.")
    ] = Path("plan.json"),
    attention: Annotated[
        str,
        typer.Option("--attention", "-a", metavar="NAME,NAME:OPTION=VALUE,...", help="What a layer may be given."),
    ] = "near-field:sinks=4,fma:sinks=4,score=mean",
    vary: Annotated[
        str,
        typer.Option(metavar="OPTION=VALUE,VALUE,...", help="Each mechanism that has this option, with each value."),
    ] = "open=4,8,16,32,64",
    gguf: Weights = None,
    context: Annotated[str, typer.Option("--context", "-n", metavar="N", help="Tokens of a window.")] = "8192",
    start: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="Characters of the text that windows begin with; what they say is averaged."
        ),
    ] = "0",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Give each layer of a pretrained model its own mechanism, such that all read so many rows and lose the least.

    One window of text is read for each layer and each mechanism, with full attention in all other layers.
    """
    import torch
    from rich.console import Console

    from farfield import hf
    from farfield.bench import records
    from farfield.bench.compare import Entry
    from farfield.train.config import pick_device

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype}")
    candidates = _varied(chosen(attention, "--attention"), vary)
    tokens, where = number(context, "--context"), pick_device(device)
    allowed, starts = _rows(rows, tokens), _starts(start)
    about = {
        "model": gguf or Path(model).name, "text": text.name, "start": starts, "tokens": tokens, "dtype": dtype,
        "candidates": [[name, options] for name, options in candidates],
    }  # fmt: skip
    held, measured = _begun(out, about)
    layers, env = len(held.get("layers", ())), held.get("env", {})
    # what all mechanisms of a name have in common is in the plan
    option = vary.partition("=")[0]
    labels = [Entry(name, {k: v for k, v in options.items() if k == option}).label for name, options in candidates]
    if len(set(labels)) < len(labels):
        labels = [Entry(*each).label for each in candidates]
    notes = Console(stderr=True, highlight=False)

    def keep(**more: Any) -> None:
        losses = [[at, *asdict(x).values()] for at, x in measured]
        written = about | {"env": env, "measured": losses} | more
        records.write_atomic(out, json.dumps(written) + "\n")

    def missing(start: int) -> list[int]:
        """Layers that are not measured with all candidates; they are measured again."""
        done = {(x.layer, x.candidate) for at, x in measured if at == start}
        return [n for n in range(layers) if any((n, c) not in done for c in range(len(candidates)))]

    if not layers or any(map(missing, starts)):
        with notes.status(f"loading {model}"):
            pretrained, windows = load(model, gguf, text, starts, tokens, getattr(torch, dtype))
            pretrained = pretrained.to(where).eval()
        layers, env = hf.count_layers(pretrained), records.environment(where)
        for at, ids in zip(starts, windows, strict=True):
            left = missing(at)
            measured = [(begin, x) for begin, x in measured if begin != at or x.layer not in left]
            with notes.status(f"character {at:,}") as status:
                for each in hf.losses(pretrained, ids, candidates, layers=left) if left else ():
                    measured.append((at, each))
                    status.update(f"character {at:,}, layer {each.layer} of {layers}: {labels[each.candidate]}")
                    if each.candidate == len(candidates) - 1:
                        keep()
    found = [x for at, x in measured if at in starts]
    picks = hf.plan(found, allowed)
    keep(rows=allowed, layers=[list(candidates[pick]) for pick in picks])
    print(f"{'layer':>5}  {'rows':>7}  {'nats lost':>9}  attention", flush=True)
    total_rows = total = 0.0
    for layer, pick in enumerate(picks):
        same = [x for x in found if (x.layer, x.candidate) == (layer, pick)]
        read, lost = (sum(getattr(x, of) for x in same) / len(same) for of in ("rows", "divergence"))
        total_rows, total = total_rows + read / layers, total + lost
        print(f"{layer:>5}  {read:>7,.0f}  {lost:>9.5f}  {labels[pick]}")
    print(
        f"{'all':>5}  {total_rows:>7,.0f}  {total:>9.5f}  {total_rows / tokens:.1%} of {tokens:,}; nats, if they add up"
    )


def _varied(given: list[tuple[str, dict[str, Any]]], vary: str) -> list[tuple[str, dict[str, Any]]]:
    """Each mechanism as it is, or with each value where it has the option."""
    import inspect

    from farfield import mechanisms

    option, equals, values = vary.partition("=")
    if not equals or not option.isidentifier() or not values:
        raise ValueError(f"--vary takes OPTION=VALUE,VALUE,..., such as open=4,8,16; got {vary!r}")
    try:
        values = [json.loads(x) for x in values.split(",")]
    except json.JSONDecodeError:
        raise ValueError(f"--vary takes numbers, true or false as values, got {vary!r}") from None
    found: list[tuple[str, dict[str, Any]]] = []
    some = False
    for name, options in given:
        has = option in inspect.signature(mechanisms.get(name)).parameters and option not in options
        found += [(name, options | {option: value}) for value in values] if has else [(name, options)]
        some |= has
    if not some:
        raise ValueError(
            f"--vary {option}: none of {', '.join(name for name, _ in given)} has that option, not given yet"
        )
    return found


def _rows(text: str, tokens: int) -> float:
    """ "10%" of the tokens, or a number of rows."""
    try:
        found = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"--rows takes a number, or one with % for a share of the tokens; got {text!r}") from None
    found = found / 100 * tokens if text.endswith("%") else found
    if not 0 < found <= tokens:
        raise ValueError(f"--rows must be more than 0 and at most the window's {tokens:,} tokens, got {text}")
    return found


def _starts(text: str) -> list[int]:
    try:
        found = [int(x) for x in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"--start takes different whole numbers with commas between, such as 0,100000; got {text}")
    return found


def _begun(path: Path, about: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, Loss]]]:
    """The file of an earlier run, and what it has measured."""
    from farfield.hf import Loss

    if not path.exists():
        return {}, []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in about.items() if held[name] != value and name != "start"]
        found = [(at, Loss(*each)) for at, *each in held["measured"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a plan of farfield budget; give another --out") from None
    if other:
        raise ValueError(f"{path} was measured with another {', '.join(other)}; give another --out, or remove it")
    return held, found
