"""The training loop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from farfield.nn import Decoder, Encoder, ModelConfig, build
from farfield.train import checkpoint
from farfield.train.config import FREE, TrainConfig, autocast, pick_device
from farfield.train.data import Data, Source, open_data
from farfield.train.evaluate import Evaluation, evaluate
from farfield.train.fast import Captured, compiled
from farfield.train.optim import Optimizers, rate
from farfield.train.report import Bar, Log

S = TypeVar("S", bound=Source)


@dataclass(frozen=True)
class TrainResult(Generic[S]):
    """What a run leaves behind.

    Args:
        model: with its last weights.
        data: what it was trained and measured on.
        history: the entries of log.jsonl: {"step", "loss", "lr", "tokens_per_second", "seconds"} and
            {"step", "bits_per_byte", "early", "late"}.
        checkpoint: folder of the last checkpoint.
        step: steps taken, of `steps`.
        interrupted: stopped by Ctrl-C or SIGTERM before the end; `resume=True` goes on.
    """

    model: Decoder | Encoder
    data: S
    history: list[dict[str, Any]]
    checkpoint: Path
    step: int
    steps: int
    interrupted: bool


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], object] | None = None,
) -> TrainResult[Data]:
    """Train a model on text; log, evaluate and save as it goes.

    A run that is cut at any step and resumed ends with the same weights as one that is not, bit for bit on a CPU.
    Ctrl-C and SIGTERM let the step finish, save and return; a second Ctrl-C stops at once.

    Args:
        resume: go on from the newest checkpoint in `config.out`.
        progress: show a progress bar.
        on_step: called with the number of steps taken, after each; if it returns True the run stops as by Ctrl-C.

    Raises:
        FileNotFoundError, ValueError: no such text, too little of it, configs that do not fit together or do not fit
            the checkpoint, or a loss that is no longer finite.
        OSError: a checkpoint cannot be written; earlier ones are intact.
    """
    _check_configs(model_config, config)
    data = open_data(
        config.text,
        tokens=config.tokens,
        valid=config.valid,
        held_out=config.held_out,
        tokenizer=config.tokenizer,
        cache=config.cache,
    )

    def measure(model: Decoder | Encoder) -> Evaluation:
        return evaluate(
            model, data.valid, windows=config.eval_windows, dtype=config.dtype, mask_share=config.mask_share
        )

    return fit(model_config, config, data, measure, resume=resume, progress=progress, on_step=on_step)


def fit(
    model_config: ModelConfig,
    config: TrainConfig,
    data: S,
    measure: Callable[[Decoder | Encoder], Evaluation] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], object] | None = None,
) -> TrainResult[S]:
    """`train` on any source of batches; the fields of `config` that name text are not read.

    Args:
        measure: held-out prediction every `config.eval_every` steps and at the end; None: not measured.
    """
    _check_configs(model_config, config)
    run, device = Path(config.out), pick_device(config.device)
    _check_vocab(model_config, data)
    torch.manual_seed(config.seed)
    model = build(model_config).to(device)
    model.teach(config.auxiliary > 0)
    optimizers = Optimizers(model, config)
    step = _resume(run, model, optimizers, config, data) if resume else _start(run)
    graph = config.graph and device.type == "cuda"
    if graph:
        optimizers.capturable()
    per_step = config.batch * config.accumulate
    losses: list[torch.Tensor] = []
    saved: Path | None = None

    def batch(sample: int) -> list[torch.Tensor]:
        inputs, targets = data.train.batch(config.seed, sample, config.batch)
        if isinstance(model, Encoder):
            draw = torch.Generator().manual_seed((config.seed << 32) + sample)
            inputs, targets = model.corrupt(inputs, share=config.mask_share, generator=draw)
        return [_to(device, inputs), _to(device, targets)]

    def take_step(*batches: torch.Tensor) -> torch.Tensor:
        """The mean loss of inputs and targets in turn."""
        found = []
        for inputs, targets in zip(batches[::2], batches[1::2], strict=True):
            with autocast(device, config.dtype):
                loss = model.loss(inputs, targets) / config.accumulate
            own = model.auxiliary() if config.auxiliary else None
            (loss if own is None else loss + config.auxiliary / config.accumulate * own).backward()
            found.append(loss.detach())
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizers.step()
        return torch.stack(found).sum()

    replayed: Captured | None = None

    def next_step(batches: list[torch.Tensor]) -> torch.Tensor:
        nonlocal replayed
        if not graph:
            return take_step(*batches)
        if replayed is None:
            own = [x.clone() for x in batches]
            replayed = Captured(lambda: take_step(*own), own)
        return replayed(*batches)

    def due(every: int) -> bool:
        return step == config.steps or (every > 0 and step % every == 0)

    def save() -> Path:
        return checkpoint.save(run, step, model, optimizers, config, digest=data.digest, codec=data.codec)

    log = Log(run, step)
    shown = Bar(config.steps, step, per_step * config.tokens, show=progress, held=measure is not None)
    with shown as bar, Interrupt() as interrupt, compiled(model, on=config.compile):
        while step < config.steps and not interrupt.asked:
            started, factor = time.perf_counter(), rate(step, config)
            optimizers.scale(factor)
            samples = range(step * per_step, (step + 1) * per_step, config.batch)
            losses.append(next_step([x for sample in samples for x in batch(sample)]))
            step += 1

            saving = interrupt.asked or due(config.save_every)
            logging = saving or due(config.log_every)
            # waits for the device, so it counts as training time
            mean = float(torch.stack(losses).mean()) if logging else 0.0
            bar.busy += time.perf_counter() - started
            if logging:
                _check_finite(mean, step, run)
                losses.clear()
                bar.update(step, loss=mean)
                log.write(step=step, loss=mean, lr=factor * config.rates[0],
                          tokens_per_second=bar.recent(step), seconds=bar.seconds)  # fmt: skip
            if measure is not None and due(config.eval_every):
                with as_written(config.compile):
                    found = measure(model)
                bar.update(step, bits=found.bits_per_byte)
                log.write(step=step, bits_per_byte=found.bits_per_byte, early=found.early, late=found.late)
            if saving:
                saved = save()
            bar.update(step)
            if on_step is not None and on_step(step) is True:
                interrupt.asked = True
        if step < config.steps:
            saved = save()
            bar.say(
                f"Stopped at step {step} of {config.steps}, saved in {saved}. To go on: the same command with --resume."
            )
    saved = saved or checkpoint.read(run).path
    return TrainResult(model, data, log.history, saved, step, config.steps, step < config.steps)


def as_written(compiled: bool = True):
    """The context in which compiled blocks run as they are written: evaluation has other shapes, for a few forwards."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _to(device: torch.device, x: torch.Tensor) -> torch.Tensor:
    """To the device; on a GPU without waiting for the work there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _start(run: Path) -> int:
    if found := checkpoint.steps(run):
        raise ValueError(
            f"{run} already holds a run, up to {found[-1].name}: resume it (resume=True), or choose another folder"
        )
    return 0


def _resume(run: Path, model: Decoder | Encoder, optimizers: Optimizers, config: TrainConfig, data: Source) -> int:
    found = checkpoint.read(run)
    pairs = [(found.model.to_dict(), model.config.to_dict()), (found.train.to_dict(), config.to_dict())]
    pairs = [tuple(json.loads(json.dumps(config)) for config in pair) for pair in pairs]  # JSON knows no tuples
    changed = [
        f"{name} was {old[name]!r} and is now {new[name]!r}"
        for old, new in pairs
        for name in new
        if old[name] != new[name] and name not in (*FREE, "text", "valid", "tokenizer")
    ]
    if changed:
        raise ValueError(
            f"cannot resume {found.path}: {'; '.join(changed)}. Keep the run's values, or start a new run."
        )
    if found.digest != data.digest:
        raise ValueError(f"cannot resume {found.path}: the text has changed since. Restore it, or start a new run.")
    if found.step > config.steps:
        raise ValueError(f"cannot resume {found.path}: it has taken {found.step} steps, steps={config.steps}")
    checkpoint.restore(found, model, optimizers)
    return found.step


def _check_configs(model_config: ModelConfig, config: TrainConfig) -> None:
    for name, x, kind in (("model_config", model_config, ModelConfig), ("config", config, TrainConfig)):
        if not isinstance(x, kind):
            raise TypeError(f"train: {name} must be a {kind.__name__}, got {type(x).__name__}")


def _check_vocab(config: ModelConfig, data: Source) -> None:
    need = data.vocab + (config.kind == "encoder")
    if config.vocab < need:
        why = " and the mask token" if config.kind == "encoder" else ""
        raise ValueError(f"ModelConfig: vocab={config.vocab}, but the text's tokens{why} need vocab={need}")


def _check_finite(loss: float, step: int, run: Path) -> None:
    if not math.isfinite(loss):
        last = checkpoint.steps(run)
        where = f"the last checkpoint is {last[-1]}" if last else "nothing was saved"
        raise ValueError(
            f"the loss is {loss} at step {step}; {where}. Lower lr, lengthen warmup, or use dtype=float32."
        )


class Interrupt:
    """Within it, the first Ctrl-C or SIGTERM only sets `asked`; the second Ctrl-C interrupts as ever."""

    def __init__(self):
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
