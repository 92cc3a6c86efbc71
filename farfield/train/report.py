"""What a run tells: a progress bar on the terminal and a line of JSON a measurement."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Log:
    """run/log.jsonl: one JSON object a line. On resuming, lines after the checkpoint's step are dropped."""

    def __init__(self, run: Path, step: int):
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.jsonl"
        self.history: list[dict[str, Any]] = [e for e in read_log(self.path) if e["step"] <= step] if step else []
        partial = run / ".log.jsonl"
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.history))
        os.replace(partial, self.path)

    def write(self, **entry: Any) -> None:
        self.history.append(entry)
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl; a last line that a crash cut short is left out."""
    path, entries = Path(path), []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class Bar:
    """Step, loss, held-out bits, tokens/s and time left: a live bar on a terminal, a line now and then elsewhere.

    Args:
        steps: of the whole run.
        done: taken before.
        tokens: of one step.
        show: False for silence.
        held: whether held-out text is measured.
    """

    def __init__(self, steps: int, done: int, tokens: int, *, show: bool = True, held: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.steps, self.first, self.tokens, self.show = steps, done, tokens, show
        self.held, self.loss, self.bits = held, "-", "-"
        self.busy = 0.0  # seconds of training, without evaluation and saving
        self.mark = (done, 0.0)
        self.started = self.said = time.perf_counter()
        console = Console(stderr=True, quiet=not show)
        self.live = show and console.is_terminal
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task("", total=steps, completed=done)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    @property
    def seconds(self) -> float:
        """Since the start, everything included."""
        return time.perf_counter() - self.started

    def speed(self, step: int) -> float:
        """Tokens a second of training."""
        return (step - self.first) * self.tokens / max(self.busy, 1e-9)

    def recent(self, step: int) -> float:
        """The same since the last call of this; the first call counts what comes before training, such as compiling."""
        (before, then), self.mark = self.mark, (step, self.busy)
        return (step - before) * self.tokens / max(self.busy - then, 1e-9)

    def update(self, step: int, *, loss: float | None = None, bits: float | None = None) -> None:
        """Show what is known after `step` steps."""
        self.loss = self.loss if loss is None else f"{loss:.3f}"
        self.bits = self.bits if bits is None else f"{bits:.3f}"
        held = f"held-out bits/byte {self.bits}  " if self.held else ""
        text = f"loss {self.loss}  {held}{self.speed(step):,.0f} tokens/s"
        self.progress.update(self.task, completed=step, description=text)
        now = time.perf_counter()
        if self.show and not self.live and (bits is not None or now - self.said > 30):
            self.said = now
            left = (self.steps - step) * self.seconds / max(step - self.first, 1)
            self.say(f"step {step}/{self.steps}  {text}  {left:,.0f} s left")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.show:
            self.progress.console.print(text, highlight=False, soft_wrap=True, markup=False)
