"""The same small model with several mechanisms, trained to recall: what each finds again, by length and by distance.

As compare, with a task drawn from a seed in place of text: equal steps on the same samples in the same order. Test
samples are the same for all, from a stream that no training seed reaches, at the length of training and at others.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from farfield.bench import compare, learning, plots, report
from farfield.bench.compare import Comparison, Entry, Settings, measure_step
from farfield.bench.records import write_atomic
from farfield.bench.runner import reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from farfield.nn import Decoder, ModelConfig
    from farfield.train import TrainConfig
    from farfield.train.synthetic import Task

NAME, PAGE, FIGURE = "recall.json", "recall.md", "recall.svg"

SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"length": 256, "lengths": (256, 512, 1024), "batch": 16, "width": 64, "layers": 2, "heads": 2,
            "scored": 64},
    "cuda": {"length": 4096, "lengths": (4096, 16384, 65536), "batch": 16, "width": 256, "layers": 4, "heads": 4,
             "scored": 64, "dtype": "bfloat16"},
}  # fmt: skip
"""What a plain run has on which kind of device."""

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {"cpu": {"mqar": {"vocab": 64, "pairs": 8}}, "cuda": {}}
"""Options of a task where they are not its own defaults."""


@dataclass(frozen=True)
class RecallSettings(Settings):
    """What the runs have in common: `Settings`, where `length` is that of training samples and `scored` counts test
    samples at each length.

    Args:
        task: "mqar" or "passkey".
        options: of the task.
        lengths: of test samples; empty: that of training.
    """

    task: str = "mqar"
    options: Mapping[str, Any] | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.lengths:
            object.__setattr__(self, "lengths", (self.length,))
        for length in (self.length, *self.lengths):
            self.drawn.check(length)

    @property
    def drawn(self) -> Task:
        from farfield.train.synthetic import make_task

        return make_task(self.task, **self.options or {})


def recall(
    chosen: Sequence[tuple[str, Mapping[str, Any]]],
    settings: RecallSettings,
    *,
    out: Path | str = "runs/recall",
    device: torch.device | str = "cpu",
    gpus: int = 1,
    resume: bool = False,
    own_process: bool | None = None,
    limit: float = math.inf,
    deadline: float = math.inf,
    console: Console | None = None,
) -> Path:
    """Train, score and report; returns the page. A mechanism or a length that fails is shown with its reason.

    Args:
        chosen: (registry name, options) of each mechanism.
        out: folder of checkpoints, recall.json, recall.md and the figure.
        gpus, resume, own_process, limit, deadline: see compare. Test lengths may be added on resuming.

    Raises:
        ValueError: settings that do not fit, a folder that holds a run, or one that is another run.
        KeyboardInterrupt: Ctrl-C, after what is there has been written.
    """
    from rich.console import Console

    until = time.time() + deadline
    entries = [Entry(*each) for each in chosen]
    run = Recall(Path(out), entries, settings, torch.device(device), console or Console(highlight=False))
    run.take_up(resume=resume)
    return run.carry_out(own_process=own_process, limit=limit, gpus=gpus, until=until)


class Recall(Comparison):
    """The stages of one run; `found` is what recall.json holds."""

    settings: RecallSettings
    file, free, subject = NAME, (*compare.FREE, "lengths"), "task"

    def take_up(self, *, resume: bool) -> None:
        """Settle the task, and take up what the folder holds."""
        from farfield.train.synthetic import Drawn, Examples

        task = self.settings.drawn
        about = {
            "name": task.name, "by": task.by, "options": asdict(task), "chance": task.chance,
            "digest": Drawn(Examples(task, self.settings.length)).digest,
        }  # fmt: skip
        self._begin(about, resume=resume)

    def _configs(self, entry: Entry, seed: int, steps: int) -> tuple[ModelConfig, TrainConfig]:
        model, config = super()._configs(entry, seed, steps)
        return replace(model, vocab=self.settings.drawn.vocab), config

    def _trial(self, model: ModelConfig, config: TrainConfig, folder: Path) -> tuple[Any, ...]:
        from farfield.train.synthetic import Drawn, Examples

        return measure_step, model, config, folder, Drawn(Examples(self.settings.drawn, config.tokens))

    def _work(self, model: ModelConfig, config: TrainConfig) -> tuple[Any, ...]:
        s = self.settings
        return learn, model, config, s.drawn, s.lengths, s.scored, self.folder, self.until

    def _keep(self, key: str, about: dict[str, Any]) -> None:
        self.found["runs"][key] = about
        if about["lengths"]:
            last = about["lengths"][-1]
            said = last["failed"] if "failed" in last else f"{last['accuracy']:.1%} of {last['answers']:,} answers"
            self._say(f"  {last['length']:,} tokens: {said}", style="dim")

    def _told(self, key: str) -> str:
        found = self.found["runs"].get(key, {}).get("lengths", ())
        return ", ".join(f"{x['length']:,}: {x['accuracy']:.1%}" for x in found if "failed" not in x) or "ends"

    def _complete(self, about: Mapping[str, Any]) -> bool:
        if "cut" in about:
            return False
        there = {x["length"] for x in about.get("lengths", ()) if "failed" not in x}
        return there.issuperset(self.settings.lengths)

    def finish(self) -> Path:
        """Write the page and the figure from what there is."""
        return render(self.folder)

    def say(self) -> None:
        """The table of accuracies, and what failed."""
        from rich.table import Table

        if models := merged(self.found):
            trained, task = self.found["trained"], self.found["task"]
            self.console.print(
                f"\n{task['name']}: answers right after {trained['steps']:,} steps of {trained['batch']} x "
                f"{trained['length']:,} tokens; guessing gets {task['chance']:.1%}",
                soft_wrap=True,
            )
            table = Table(box=None, pad_edge=False, header_style="bold")
            headings, rows = accuracy_rows(models)
            # seeds and parameters are in the page: 80 columns hold the rest
            for at, heading in enumerate(headings):
                table.add_column(heading, justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
            for row in rows:
                table.add_row(*row)
            self.console.print(table)
        for line in failures(self.found):
            self.console.print(line, style="yellow", markup=False, soft_wrap=True)


def learn(
    model: ModelConfig,
    config: TrainConfig,
    task: Task,
    lengths: Sequence[int],
    scored: int,
    root: Path,
    until: float,
    shown: bool,
) -> Iterator[dict[str, Any]]:
    """Train a model, from its checkpoint where there is one, and score it: what is known after each length.

    A length that fails, because of memory or a refusal, does not end the run.
    """
    from farfield.train import Examples, checkpoint, fit
    from farfield.train import recall as measure
    from farfield.train.synthetic import TEST, Drawn

    # the code compiled for the model before is of no use to this one, and the number of codes is limited
    torch.compiler.reset()
    data = Drawn(Examples(task, config.tokens))
    result = fit(model, config, data, resume=bool(checkpoint.steps(config.out)), progress=shown,
                 on_step=lambda _: time.time() >= until)  # fmt: skip
    about = learning.trained(result, config.batch * config.tokens, root)
    if result.interrupted and time.time() < until:
        raise KeyboardInterrupt
    if result.interrupted:
        about["cut"] = result.step * config.batch * config.tokens
    about |= {"speed": learning.steady_speed(result), "memory": learning.step_memory(result, config), "lengths": []}
    for length in lengths:
        try:
            found = measure(
                cast("Decoder", result.model), Examples(task, length, TEST), samples=scored, dtype=config.dtype
            )
        except Exception as error:
            about["lengths"].append({"length": length, "failed": reason(error)})
        else:
            about["lengths"].append(found.to_dict() | {"rows": result.model.rows_read(length)})
        yield about


def merged(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scored runs by label: at each length the mean over seeds and each seed's, the mean of each bucket, rows."""
    from farfield.bench.tables import size

    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for about in found["runs"].values():
        if any("failed" not in x for x in about["lengths"]):
            by_label.setdefault(about["label"], []).append(about)
    made = {}
    for label, several in by_label.items():
        at: dict[int, list[Mapping[str, Any]]] = {}
        for about in several:
            for x in about["lengths"]:
                if "failed" not in x:
                    at.setdefault(x["length"], []).append(x)
        speeds = [about["speed"] for about in several if about["speed"] is not None]
        made[label] = {
            "parameters": several[0]["parameters"],
            "speed": statistics.fmean(speeds) if speeds else None,
            "memory": size(several[0]["memory"]),
            "curve": several[0]["curve"],
            "lengths": {
                length: {
                    "accuracy": statistics.fmean(x["accuracy"] for x in each),
                    "seeds": [x["accuracy"] for x in each],
                    "whole": statistics.fmean(x["whole"] for x in each),
                    # the same samples for all
                    "buckets": {
                        same[0]["name"]: statistics.fmean(b["accuracy"] for b in same)
                        for same in zip(*(x["buckets"] for x in each), strict=True)
                    },
                    "rows": each[0]["rows"],
                }
                for length, each in sorted(at.items())
            },
        }
    return made


def accuracy_rows(models: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and one line for each mechanism: accuracy by length, rows read at the ends, speed, memory."""
    lengths = _lengths(models)
    # rows at the shortest and the longest length tell how they grow
    ends = sorted({lengths[0], lengths[-1]})
    headings = ["attention", *(f"{n:,}" for n in lengths), *(f"rows at {n:,}" for n in ends), "tokens/s", "memory"]
    rows = []
    for label, m in models.items():
        cells = [f"{m['lengths'][n]['accuracy']:.1%}" if n in m["lengths"] else "" for n in lengths]
        read = [m["lengths"][n]["rows"] if n in m["lengths"] else None for n in ends]
        cells += ["" if x is None else f"{x:,.0f}" for x in read]
        rows.append([label, *cells, "" if m["speed"] is None else f"{m['speed']:,.0f}", m["memory"]])
    return headings, rows


def failures(found: Mapping[str, Any]) -> list[str]:
    """What failed, a line each."""
    lines = [f"{x['label']}, seed {x['seed']}, failed: {x['reason']}" for x in found["failed"].values()]
    return lines + [
        f"{about['label']}, seed {about['seed']}, at {x['length']:,} tokens, failed: {x['failed']}"
        for about in found["runs"].values()
        for x in about["lengths"]
        if "failed" in x
    ]


def render(folder: Path | str) -> Path:
    """Write recall.md and recall.svg from recall.json, without running anything.

    Raises:
        FileNotFoundError: the folder has no recall.json.
    """
    folder = Path(folder)
    if not (folder / NAME).exists():
        raise FileNotFoundError(f"{folder}: nothing to report: {NAME} is not there")
    found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if models := merged(found):
        plots.save(figure(found, models), folder / FIGURE)
    write_atomic(folder / PAGE, markdown(found))
    return folder / PAGE


def figure(found: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy by length, and at each length by distance or depth."""
    lengths, task = _lengths(models), found["task"]
    return plots.recall_figure(
        {label: {n: x["accuracy"] for n, x in m["lengths"].items()} for label, m in models.items()},
        {n: {label: m["lengths"][n]["buckets"] for label, m in models.items() if n in m["lengths"]} for n in lengths},
        by=task["by"], chance=task["chance"], trained=found["trained"]["length"],
    )  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """The page: accuracy by length, by distance or depth at each length, seeds, what failed, how to repeat it."""
    task, models = found["task"], merged(found)
    given = ", ".join(f"{k} {v}" for k, v in task["options"].items() if v is not None)
    lines = [f"# Recall: {task['name']}", "", f"Task: {given}. Guessing gets {task['chance']:.2%} of the answers.", ""]
    if trained := found.get("trained"):
        lines += [
            f"The same model was trained with each mechanism for {trained['steps']:,} steps of {trained['batch']} x "
            f"{trained['length']:,} tokens ({trained['tokens']:,}), scored on the answers alone: the same samples, the "
            "same recipe and initial weights from the same seed. Test samples, "
            f"{found['settings']['scored']} at each length, are those of no training seed.",
            "",
        ]
    if models:
        headings, rows = accuracy_rows(models)
        lines += ["Share of the answers that are right, by length:", "", *_table(headings, rows)]
        body = [
            [label, *(f"{m['lengths'][n]['whole']:.1%}" if n in m["lengths"] else "" for n in _lengths(models))]
            for label, m in models.items()
        ]
        headings = ["attention", *(f"{n:,}" for n in _lengths(models))]
        lines += ["Share of the samples all of whose answers are right:", "", *_table(headings, body)]
        for n in _lengths(models):
            at = {label: m["lengths"][n] for label, m in models.items() if n in m["lengths"]}
            names = list(dict.fromkeys(name for x in at.values() for name in x["buckets"]))
            body = [
                [label, *(f"{x['buckets'][name]:.1%}" if name in x["buckets"] else "" for name in names)]
                for label, x in at.items()
            ]
            lines += [f"At {n:,} tokens, by {_BY[task['by']]}:", "", *_table(["attention", *names], body)]
        if any(len(x["seeds"]) > 1 for m in models.values() for x in m["lengths"].values()):
            body = [
                [label, *(" ".join(f"{x:.1%}" for x in m["lengths"][n]["seeds"]) if n in m["lengths"] else ""
                          for n in _lengths(models))]
                for label, m in models.items()
            ]  # fmt: skip
            lines += ["By seed:", "", *_table(["attention", *(f"{n:,}" for n in _lengths(models))], body)]
        lines += [
            f"![Accuracy by length and {task['by']}]({FIGURE})", "",
            "Rows: rows that enter a query's softmax, on average; none for a scan. Tokens/s: of training steps. "
            "Memory: what the forward and the backward of one step allocate at their peak, gradients included.", "",
        ]  # fmt: skip
    for line in failures(found):
        lines += [line, ""]
    return "\n".join(lines + report.provenance(found))


_BY = {"distance": "the tokens from a query back to its key", "depth": "the depth of the key, 0 % at the start"}


def _lengths(models: Mapping[str, Mapping[str, Any]]) -> list[int]:
    return sorted({n for m in models.values() for n in m["lengths"]})


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]
