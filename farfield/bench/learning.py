"""What demo and compare share: one model trained on text with one attention, and what is told about it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from farfield.bench import memory

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.nn import Decoder, ModelConfig
    from farfield.train import Evaluation, Split, TrainConfig, TrainResult
    from farfield.train.data import Source

RECIPE = ("optimizer", "lr", "warmup", "schedule", "clip", "dtype", "seed")


class _Enough(Exception):
    """Ends a trial."""


def step_seconds(
    model: ModelConfig, config: TrainConfig, folder: Path, *, data: Source | None = None, first: int = 1, steps: int = 2
) -> float:
    """Duration of a training step: the mean of `steps`, after the first ones, which also set things up.

    Args:
        folder: of the trial; deleted again.
        data: what is learned from; None: the text of `config`.

    Raises:
        KeyboardInterrupt: the trial was stopped.
    """
    from farfield.train import fit, train

    moments: dict[int, float] = {}

    def note(step: int) -> None:
        if step in (first, first + steps):
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            moments[step] = time.perf_counter()
        if step == first + steps:
            raise _Enough

    trial = replace(config, out=str(folder), steps=1000, log_every=0, save_every=0, eval_every=0)
    try:
        if data is None:
            interrupted = train(model, trial, progress=False, on_step=note).interrupted
        else:
            interrupted = fit(model, trial, data, progress=False, on_step=note).interrupted
        if interrupted:
            raise KeyboardInterrupt
    except _Enough:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return (moments[first + steps] - moments[first]) / steps


def trained(result: TrainResult, size: int, root: Path) -> dict[str, Any]:
    """What is told of a run before it is scored.

    Args:
        size: tokens of a step.
        root: what the path of the checkpoint is relative to.
    """
    return {
        "checkpoint": result.checkpoint.relative_to(root).as_posix(),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "curve": [(e["step"] * size, round(e["loss"] / math.log(2), 4)) for e in result.history if "loss" in e],
    }


def steady_speed(result: TrainResult) -> float | None:
    """Tokens a second in training: the median of what the log says, without what a session sets up and compiles."""
    import statistics

    logged = [e for e in result.history if "tokens_per_second" in e]
    # a session's clock starts again
    firsts = {i for i, e in enumerate(logged) if i == 0 or e["seconds"] < logged[i - 1]["seconds"]}
    found = [e["tokens_per_second"] for i, e in enumerate(logged) if i not in firsts] or [
        e["tokens_per_second"] for e in logged
    ]
    return statistics.median(found) if found else None


def held_out(held: Evaluation) -> dict[str, Any]:
    """How much was scored, and which positions are early and late."""
    return {
        "windows": held.windows,
        "bytes": held.bytes,
        "early": (0, max(1, held.length // 16)),
        "late": (held.length // 2, held.length),
    }


def scores(held: Evaluation) -> dict[str, Any]:
    """Bits per byte: overall, early, late, by position, by distance to the last repeat."""
    return {
        "overall": held.bits_per_byte,
        "early": held.early,
        "late": held.late,
        "by_position": [(b.name, b.bits_per_byte, b.share) for b in held.by_position],
        "by_repeat": [(b.name, or_none(b.bits_per_byte), b.share) for b in held.by_repeat],
    }


def step_memory(result: TrainResult, config: TrainConfig) -> int:
    """Peak bytes that forward and backward of one step allocate as written, gradients included, weights not."""
    from farfield.train.config import autocast

    model, data = result.model, result.data
    device = model.embed.weight.device
    batch = [x.to(device) for x in data.train.batch(config.seed, 0, config.batch)]

    def call() -> tuple[torch.Tensor, ...]:
        with autocast(device, config.dtype):
            loss = model.loss(batch[0], batch[1])
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    call()
    return memory.measure(call, device).peak


def at_length(
    model: Decoder, split: Split, length: int, dtype: str, *, sample: int, longest: int = 1 << 17
) -> dict[str, Any]:
    """What the model makes of windows of another length; or why it cannot.

    Args:
        sample: so many tokens, the first of the split, are read at every length that they hold, so that lengths can be
            compared.
        longest: length up to which the state is measured.

    Returns:
        bits per byte overall, late and by position, tokens a second of the forwards, rows read; `state`: bytes that
        decoding after so many tokens keeps, None where it was not measured.
    """
    from farfield.bench.runner import reason
    from farfield.train import Split, evaluate
    from farfield.train.config import autocast

    said: dict[str, Any] = {"length": length}
    device = model.embed.weight.device
    try:
        tokens = max(length, min(sample, len(split.ids) - 1) // length * length)
        sizes = None if split.sizes is None else split.sizes[: tokens + 1]
        part = Split(split.ids[: tokens + 1], sizes, length)
        if part.windows > 1:
            evaluate(model, part, windows=1, dtype=dtype)  # kernels are compiled for the length
        began = time.perf_counter()
        held = evaluate(model, part, dtype=dtype)
        said |= {
            "overall": held.bits_per_byte, "late": held.late, "tokens": held.tokens,
            "by_position": [(b.name, b.bits_per_byte, b.share) for b in held.by_position],
            "speed": held.tokens / (time.perf_counter() - began), "rows": model.rows_read(length), "state": None,
        }  # fmt: skip
        if length <= longest:
            # not every mechanism can decode
            with torch.no_grad(), autocast(device, dtype), suppress(NotImplementedError):
                ids = part.window(0)[0][None, :length].to(device)
                said["state"] = model.eval().extend(ids, last=True)[1].nbytes
    except Exception as error:
        said["failed"] = reason(error)
    return said


def recipe(config: TrainConfig) -> dict[str, Any]:
    """The part of the configuration that a report shows."""
    return plain(config.to_dict(), keep=RECIPE)


def plain(values: Mapping[str, Any], *, keep: Sequence[str] = (), drop: Sequence[str] = ()) -> dict[str, Any]:
    return {k: v for k, v in values.items() if (k in keep or not keep) and k not in drop and v is not None}


def or_none(x: float) -> float | None:
    return None if math.isnan(x) else x


def print_scores(
    console: Console, title: str, models: Mapping[str, Mapping[str, Any]], held: Mapping[str, Any],
    columns: Sequence[tuple[str, str, str]],
) -> None:  # fmt: skip
    """The table of held-out results. `columns`: heading, key and format of what stands behind them."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title=title)
    bits = [("all", "overall"), (f"first {held['early'][1]:,}", "early"), (f"from {held['late'][0]:,}", "late")]
    for at, heading in enumerate(["attention", *(h for h, _ in bits), *(h for h, _, _ in columns)]):
        table.add_column(heading, justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
    for name, m in models.items():
        cells = [(m.get(key), ".3f") for _, key in bits] + [(m.get(key), form) for _, key, form in columns]
        table.add_row(name, *("" if x is None else x if isinstance(x, str) else format(x, f) for x, f in cells))
    console.print(table)
