"""train: a model on any text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.cli.errors import INTERRUPTED
from farfield.cli.options import examples, number, parse, unset

if TYPE_CHECKING:
    from farfield.nn import ModelConfig
    from farfield.train import TrainConfig

EXAMPLES = examples(
    "farfield train book.txt --out runs/book",
    "farfield train 'src/**/*.py' --attention window -o width=256 --tokens 4k --steps 2000",
    "farfield train corpus/ --tokenizer tokenizer.json --batch 4 --accumulate 8 --dtype bfloat16 --device cuda",
    "farfield train --out runs/book --resume",
)

MODEL, TEXT, RECIPE, RUN = "Model", "Text", "Recipe", "Run"
in_model, in_text, in_recipe, in_run = (partial(unset, rich_help_panel=p) for p in (MODEL, TEXT, RECIPE, RUN))


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to `app`."""
    app.command("train", rich_help_panel=panel, epilog=EXAMPLES)(train)


def train(
    text: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Files, folders or globs to learn from.")
    ] = None,
    # the model; defaults are ModelConfig's
    attention: Annotated[str | None, in_model("fma", "Mechanism, as in farfield list.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", rich_help_panel=MODEL, help="An option of the mechanism."),
    ] = None,
    width: Annotated[int | None, in_model(256, "Width of the residual stream.")] = None,
    layers: Annotated[int | None, in_model(4, "Blocks.")] = None,
    heads: Annotated[int | None, in_model(4, "Query heads.")] = None,
    kv_heads: Annotated[int | None, in_model("as many as heads", "Key and value heads.")] = None,
    dropout: Annotated[float | None, in_model(0.0, "On what each half block adds.")] = None,
    encoder: Annotated[
        bool, typer.Option("--encoder", rich_help_panel=MODEL, help="Masked language model instead of a decoder.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="NAME=VALUE", rich_help_panel=MODEL, help="Any other field of ModelConfig: conv=0."
        ),
    ] = None,
    # the text; defaults here and below are TrainConfig's
    valid: Annotated[
        list[str] | None,
        typer.Option("--valid", metavar="TEXT", rich_help_panel=TEXT, help="Held-out text; may be repeated."),
    ] = None,
    held_out: Annotated[float | None, in_text(0.05, "Share held out, without --valid.")] = None,
    tokenizer: Annotated[Path | None, in_text("bytes", "A tokenizers JSON file.", metavar="FILE")] = None,
    cache: Annotated[
        Path | None, in_text("the user's cache folder", "Folder of tokenized text.", metavar="DIR")
    ] = None,
    # the recipe
    tokens: Annotated[
        str | None, in_recipe(2048, "Sequence length; 4k is 4096.", "--tokens", "-n", metavar="N")
    ] = None,
    batch: Annotated[int | None, in_recipe(8, "Sequences a forward.")] = None,
    accumulate: Annotated[int | None, in_recipe(1, "Forwards a step.")] = None,
    steps: Annotated[int | None, in_recipe(1000, "Optimizer steps.")] = None,
    optimizer: Annotated[str | None, in_recipe("muon", "muon or adamw.")] = None,
    lr: Annotated[float | None, in_recipe("0.01 for muon, 0.001 for adamw", "Learning rate of the matrices.")] = None,
    rest_lr: Annotated[float | None, in_recipe("0.003 for muon, lr for adamw", "Learning rate of the rest.")] = None,
    weight_decay: Annotated[float | None, in_recipe(0.1, "Of the matrices.")] = None,
    warmup: Annotated[int | None, in_recipe(100, "Steps of linear warm-up.")] = None,
    schedule: Annotated[str | None, in_recipe("linear", "linear, cosine or constant.")] = None,
    decay: Annotated[float | None, in_recipe(0.6, "Share of the steps that linear decays over.")] = None,
    clip: Annotated[float | None, in_recipe(1.0, "Largest gradient norm; 0 for none.")] = None,
    auxiliary: Annotated[
        float | None, in_recipe(0.0, "Weight of what mechanisms minimize, as a learned score.")
    ] = None,
    dtype: Annotated[str | None, in_recipe("float32", "float32, or bfloat16 for autocast.")] = None,
    compile: Annotated[
        bool | None, in_recipe("no-compile", "torch.compile around the mechanisms.", "--compile/--no-compile")
    ] = None,
    graph: Annotated[bool | None, in_recipe("no-graph", "A step as one CUDA graph.", "--graph/--no-graph")] = None,
    seed: Annotated[int | None, in_recipe(0, "Of weights, order of the text and dropout.")] = None,
    # the run
    out: Annotated[Path | None, in_run("runs/farfield", "Folder of checkpoints and log.", metavar="DIR")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=RUN, help="Go on from the last checkpoint in --out.")
    ] = False,
    device: Annotated[str | None, in_run("auto", "cpu, cuda, cuda:1, mps or auto.")] = None,
    log_every: Annotated[int | None, in_run(10, "Steps.")] = None,
    eval_every: Annotated[int | None, in_run(250, "Steps; 0 at the end only.")] = None,
    eval_windows: Annotated[int | None, in_run(16, "Held-out windows of each evaluation.")] = None,
    save_every: Annotated[int | None, in_run(250, "Steps; 0 at the end only.")] = None,
    keep: Annotated[int | None, in_run(2, "Checkpoints kept.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=RUN, help="No progress.")] = False,
) -> None:
    """Train a model on text. Ctrl-C saves; the same command with --resume goes on."""
    given = {name: value for name, value in locals().items() if value is not None}
    if tokens is not None:
        given["tokens"] = number(tokens, "--tokens")
    from rich.console import Console

    from farfield.train import train as run

    model_config, config = configs(given)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    result = run(model_config, config, resume=resume, progress=not quiet)
    if result.interrupted:
        if quiet:
            console.print(f"Stopped at step {result.step} of {result.steps}, saved in {result.checkpoint}.")
        raise typer.Exit(INTERRUPTED)
    last = next((entry for entry in reversed(result.history) if "bits_per_byte" in entry), None)
    if last:
        console.print(
            f"held out: {last['bits_per_byte']:.3f} bits/byte, {last['early']:.3f} early, {last['late']:.3f} late"
        )
    console.print(f"checkpoint: {result.checkpoint}")
    verb = "evaluate" if encoder else "generate"
    console.print(f"go on with: farfield {verb} {config.out}", style="dim")


def configs(given: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """The two configs of a command line; `given` holds what was given. With "resume", on top of the run's own.

    Raises:
        ValueError: no text, an unknown field, a folder that holds a run already, a value out of range.
        FileNotFoundError: no run to resume, or no tokenizer file.
    """
    from dataclasses import fields, replace

    from farfield.nn import ModelConfig
    from farfield.nn.config import known
    from farfield.train import TrainConfig, checkpoint, open_codec

    of_train = {f.name for f in fields(TrainConfig)}
    of_model = {f.name for f in fields(ModelConfig)}
    recipe: dict[str, Any] = {k: str(v) if isinstance(v, Path) else v for k, v in given.items() if k in of_train}
    recipe |= {k: tuple(v) for k, v in recipe.items() if isinstance(v, list)}
    shape: dict[str, Any] = {k: v for k, v in given.items() if k in of_model}
    shape |= known(ModelConfig, parse(given.get("model"), "--model", "--model conv=0"))
    if options := parse(given.get("option")):
        shape["attention_options"] = options
    if given["encoder"]:
        shape["kind"] = "encoder"

    out = recipe.get("out", TrainConfig.out)
    if given["resume"]:
        found = checkpoint.read(out)
        return replace(found.model, **shape), replace(found.train, **(recipe | {"out": out}))
    if saved := checkpoint.steps(out):
        raise ValueError(
            f"{out} already holds a run, up to {saved[-1].name}: go on with --resume, or give another --out"
        )
    if not recipe.get("text"):
        raise ValueError("train: no text given; name files, folders or globs, as in farfield train book.txt")
    config = TrainConfig(**recipe)
    vocab = open_codec(config.tokenizer).vocab + given["encoder"]
    return ModelConfig(**({"vocab": vocab} | shape)), config
