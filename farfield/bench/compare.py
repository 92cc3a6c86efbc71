"""The same small model with several mechanisms, on the same text: what each learns, how fast, reading how much.

Equal tokens is the rule: every run takes the same steps over the same windows in the same order, from the same seed.
A budget of minutes is turned into tokens by the slowest of them. What a run found is kept as soon as it is there; a
comparison that was cut goes on, from the checkpoint of the run that it was in. With several GPUs each has a process and
takes the next run when it is free.
"""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from farfield.bench import learning, records, report
from farfield.bench.records import slug
from farfield.bench.worker import PATIENCE, Worker, WorkError

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.nn import ModelConfig
    from farfield.train import TrainConfig
    from farfield.train.data import Source

NAME = "compare.json"
FREE = ("scored", "seeds", "again", "lengths")
"""Settings that may differ when a comparison goes on; so may the list of mechanisms."""

PER_RUN = (
    "attention", "attention_options", "other", "other_options", "other_rope_share", "other_log_scale", "every", "kind",
)  # fmt: skip
"""Fields of ModelConfig that tell the runs apart, or say nothing."""

OF_LAYERS = {"rope_share": "rope_share"}
OF_OTHERS = {"rope_share": "other_rope_share", "every": "every"}
"""Fields of ModelConfig that stand among the options of an entry's mechanisms: "near-field/fma:open=4,rope_share=0".
"""

SAMPLE = 1 << 20  # tokens of held-out text at most that all other lengths are scored on
TOLD = 20.0  # seconds between two lines on the runs under way

SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"length": 2048, "batch": 1, "width": 128, "layers": 3, "heads": 2, "scored": 16},
    "cuda": {"length": 8192, "batch": 4, "width": 512, "layers": 8, "heads": 8, "scored": 128,
             "dtype": "bfloat16"},
}  # fmt: skip
"""What a plain comparison has on which kind of device."""


@dataclass(frozen=True)
class Settings:
    """What the runs have in common.

    Args:
        steps, tokens, minutes: of each run; one of the three. `tokens` is rounded up to whole steps; `minutes` are
            those that the slowest mechanism takes, by the time of its first steps.
        length: n.
        batch: sequences a step.
        width, layers, heads, kv_heads: shape of the model.
        scored: held-out windows.
        seeds: 0, 1, ...: how many runs of each mechanism.
        again: the mechanisms that get more than seed 0, by their name, with or without options; empty: all.
        lengths: further lengths at which the trained models of seed 0 are scored, all on the same first tokens of
            the held-out text: as many as `scored`, a million at most.
        dtype, compile, graph: see TrainConfig.
        model, train: further fields of ModelConfig and TrainConfig.
    """

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    length: int = 2048
    batch: int = 1
    width: int = 128
    layers: int = 3
    heads: int = 2
    kv_heads: int | None = None
    scored: int = 16
    seeds: int = 1
    again: tuple[str, ...] = ()
    dtype: str = "float32"
    compile: bool = False
    graph: bool = False
    lengths: tuple[int, ...] = ()
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None

    def __post_init__(self):
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"compare: give one of steps, tokens and minutes for each run; got {' and '.join(given) or 'none'}"
            )
        for name in (*given, "length", "batch", "scored", "seeds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"compare: {name} must be positive, got {getattr(self, name)}")

    @property
    def size(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


@dataclass(frozen=True)
class Entry:
    """A mechanism of the comparison, with its options; `other`, if any, is that of every fourth layer.

    The options may hold what OF_LAYERS and OF_OTHERS name, for the layers that attend through it.
    """

    name: str
    options: Mapping[str, Any]
    other: tuple[str, Mapping[str, Any]] | None = None

    @property
    def label(self) -> str:
        """As it is given: "fma", "nsa:block=32,top=8", "fma/full"."""
        given = ",".join(f"{k}={v}" for k, v in self.options.items())
        own = f"{self.name}:{given}" if given else self.name
        return own if self.other is None else f"{own}/{Entry(*self.other).label}"


def compare(
    chosen: Sequence[tuple[Any, ...]],
    text: Sequence[str],
    settings: Settings,
    *,
    valid: Sequence[str] | None = None,
    out: Path | str = "runs/compare",
    device: torch.device | str = "cpu",
    gpus: int = 1,
    resume: bool = False,
    own_process: bool | None = None,
    limit: float = math.inf,
    deadline: float = math.inf,
    console: Console | None = None,
) -> Path:
    """Train, score and report; returns the page. A mechanism that fails is shown with its reason.

    Args:
        chosen: (registry name, options) of each mechanism, and (name, options) of that of every fourth layer if it is
            another one. Runs start in this order.
        text, valid: files, folders or globs; without held-out text its last 5 % are.
        out: folder of checkpoints, compare.json, report.html, compare.md and the figures.
        resume: go on with what `out` holds: finished runs are kept, failed ones are tried again.
        gpus: how many of them; above 1 each has a process of its own.
        own_process: train in another process, which a fault may take down; by default on the GPU.
        limit: seconds a run may take in a process of its own.
        deadline: seconds from now at which training ends: runs under way are scored with the tokens that they have had,
            and shown as cut; the others are not begun. `resume` goes on with both.

    Raises:
        ValueError: settings that do not fit, a folder that holds a comparison, or one that is another comparison.
        FileNotFoundError: no such text.
        KeyboardInterrupt: Ctrl-C, after what is there has been written.
    """
    from rich.console import Console

    device = torch.device(device)
    until = time.time() + deadline
    entries = [Entry(*each) for each in chosen]
    run = Comparison(Path(out), entries, settings, device, console or Console(highlight=False))
    run.open(text, valid, resume=resume)
    return run.carry_out(own_process=own_process, limit=limit, gpus=gpus, until=until)


class Comparison:
    """The stages of one comparison. `found` is what compare.json holds.

    `env` there is that of the first sitting, `resumed` lists those of the further ones; a run that a further sitting
    made or ended says which: `sitting`, from 1.
    """

    file, free, subject = NAME, FREE, "text"

    def __init__(
        self, folder: Path, entries: Sequence[Entry], settings: Settings, device: torch.device, console: Console
    ):
        if unknown := set(settings.again) - {x for e in entries for x in (e.label, e.name)}:
            labels = ", ".join(e.label for e in entries)
            raise ValueError(f"compare: no {min(unknown)!r} among what is compared: {labels}")
        self.folder, self.entries, self.settings = folder, entries, settings
        self.device, self.console = device, console
        self.text: tuple[str, ...] = ()
        self.valid: tuple[str, ...] | None = None
        self.found: dict[str, Any] = {}
        self.until = math.inf
        self.under_way: dict[str, str | Path] = {}
        self.lock = threading.Lock()

    def carry_out(self, *, own_process: bool | None, limit: float, gpus: int = 1, until: float = math.inf) -> Path:
        """Every stage after `open`; the report is written whatever happens. `until`: see compare, as time.time()."""
        isolated = self.device.type == "cuda" if own_process is None else own_process
        if gpus > 1 and not (isolated and self.device.type == "cuda"):
            raise ValueError(f"compare: {gpus} GPUs need processes of their own on CUDA, got device {self.device}")
        self.until = until
        try:
            with ExitStack() as stack:
                numbers: list[int | None] = [None] if gpus == 1 else [*range(gpus)]
                workers = [stack.enter_context(Worker(own=isolated, limit=limit, gpu=n)) for n in numbers]
                self.plan(workers[0])
                self.train(workers)
        except BaseException:
            self.console.print(
                f"\nStopped early. What there is: {self.finish()}\nTo go on: the same command with --resume.",
                soft_wrap=True, markup=False,
            )  # fmt: skip
            raise
        page = self.finish()
        self.say()
        self.console.print(f"\nReport: [bold]{page}[/]", soft_wrap=True)
        return page

    @property
    def runs(self) -> list[tuple[Entry, int]]:
        """Every run, seed by seed, so that a cut comparison has all mechanisms once before any twice."""
        s = self.settings
        several = [e for e in self.entries if not s.again or {e.label, e.name} & set(s.again)]
        return [(e, seed) for seed in range(s.seeds) for e in (several if seed else self.entries)]

    def open(self, text: Sequence[str], valid: Sequence[str] | None, *, resume: bool) -> None:
        """Read the text, and what the folder holds."""
        self.text, self.valid = tuple(text), None if valid is None else tuple(valid)
        data = self._data()
        about = {
            "files": [Path(x).name for x in (*self.text, *(self.valid or ()))],
            "train_bytes": _bytes(data.train),
            "valid_bytes": _bytes(data.valid),
            "digest": data.digest,
        }
        self._begin(about, resume=resume)

    def _begin(self, about: Mapping[str, Any], *, resume: bool) -> None:
        """Take up what the folder holds, if it is the same comparison on the same `about`."""
        there = self.folder / self.file
        settings = json.loads(json.dumps(asdict(self.settings)))
        if not there.exists():
            self.found = {
                "settings": settings, "env": records.environment(self.device), self.subject: about,
                "runs": {}, "failed": {}, "seconds": {},
            }  # fmt: skip
        elif not resume:
            raise ValueError(
                f"{self.folder} already holds a comparison: go on with --resume (resume=True), or give another folder"
            )
        else:
            self.found = json.loads(there.read_text(encoding="utf-8"))
            before = self.found["settings"]
            changed = [f"{k} was {before[k]!r} and is now {x!r}" for k, x in settings.items()
                       if k not in self.free and before.get(k) != x]  # fmt: skip
            if about["digest"] != self.found[self.subject]["digest"]:
                changed.append(f"the {self.subject} is another one")
            if changed:
                raise ValueError(
                    f"cannot go on with {there}: {'; '.join(changed)}. Keep its values, or give another folder."
                )
            self.found["settings"], self.found["failed"] = settings, {}
            self.found.setdefault("resumed", []).append(records.environment(self.device))
        self._save()

    def plan(self, worker: Worker) -> None:
        """Settle the number of steps, the same for all."""
        s = self.settings
        if not (steps := self.found.get("trained", {}).get("steps")):
            if s.steps:
                steps = s.steps
            elif s.tokens:
                steps = math.ceil(s.tokens / s.size)
            else:
                steps = self._steps_in_time(worker, 60 * (s.minutes or 0))
        self.found["trained"] = {
            "steps": steps, "tokens": steps * s.size, "batch": s.batch, "length": s.length,
        }  # fmt: skip
        model, config = self._configs(self.entries[0], 0, steps)
        self.found["model"] = learning.plain(model.to_dict(), drop=PER_RUN)
        self.found["train"] = learning.recipe(config) | {"compile": config.compile, "graph": config.graph}
        self._save()
        self.console.print(
            f"{len(self.runs)} runs of {steps * s.size:,} tokens each: {steps:,} steps of {s.batch} x {s.length:,}"
        )

    def _steps_in_time(self, worker: Worker, seconds: float) -> int:
        """So many that the slowest mechanism takes `seconds` for them. One that fails here has failed."""
        slowest = 0.0
        for entry in self.entries:
            self.console.print(f"  measuring a step of {entry.label}", style="dim")
            model, config = self._configs(entry, 0, 1000)
            trial = self.folder / f".trial-{slug(entry.label)}"
            try:
                (took,) = worker.run(*self._trial(model, config, trial))
            except WorkError as error:
                self._fail(entry, 0, str(error))
            else:
                self.found["seconds"][f"a step of {entry.label}"] = took
                slowest = max(slowest, took)
        if not slowest:
            raise ValueError("compare: no mechanism can be trained; see the reasons in the report")
        return max(1, int(seconds / slowest))

    def train(self, workers: Sequence[Worker]) -> None:
        """Every run that is not there yet, one at a time on each worker, in the order of `runs`."""
        waiting = list(enumerate(self.runs, 1))
        if len(workers) == 1:
            while waiting:
                self._run(workers[0], *waiting.pop(0), alone=True)
            return
        broken: list[BaseException] = []

        def serve(worker: Worker) -> None:
            while not broken:
                with self.lock:
                    if not waiting:
                        return
                    number, (entry, seed) = waiting.pop(0)
                try:
                    self._run(worker, number, (entry, seed), alone=False)
                except BaseException as error:
                    broken.append(error)

        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        said = time.monotonic()
        try:
            while any(thread.is_alive() for thread in threads):
                threads[0].join(1.0) if threads[0].is_alive() else time.sleep(0.2)
                if time.monotonic() - said > TOLD:
                    said = time.monotonic()
                    self._tell()
        except KeyboardInterrupt:
            # the terminal has told the processes too: they save
            broken.append(KeyboardInterrupt())
            for thread in threads:
                thread.join(PATIENCE)
            raise
        if broken:
            raise broken[0]

    def _run(self, worker: Worker, number: int, run: tuple[Entry, int], *, alone: bool) -> None:
        """One run, unless it is there already or there is no time."""
        entry, seed = run
        key, who = _key(entry, seed), f"{entry.label}, seed {seed}"
        said = f"{number}/{len(self.runs)} {who}"
        if self._complete(self.found["runs"].get(key, {})):
            self._say(f"{said}: there already", style="dim")
            return
        if key in self.found["failed"]:
            return
        if time.time() >= self.until:
            self._fail(entry, seed, "not begun before the deadline")
            return
        self._say(said if alone else f"{said}: begins" + ("" if worker.gpu is None else f" on GPU {worker.gpu}"))
        model, config = self._configs(entry, seed, self.found["trained"]["steps"])
        if worker.gpu is not None:
            # the only one that its process sees
            config = replace(config, device="cuda")
        began = time.perf_counter()
        about: dict[str, Any] = {
            "attention": entry.name, "options": dict(entry.options), "label": entry.label, "seed": seed,
        }  # fmt: skip
        if entry.other is not None:
            about["other"] = [entry.other[0], dict(entry.other[1])]
        if sitting := len(self.found.get("resumed", ())):
            about["sitting"] = sitting
        try:
            with self.lock:
                self.under_way[who] = config.out
            for found in worker.run(*self._work(model, config), alone):
                with self.lock:
                    self._keep(key, about | found)
                    self.found["seconds"][key] = round(time.perf_counter() - began, 2)
                    self._save()
        except WorkError as error:
            self._fail(entry, seed, str(error))
        finally:
            with self.lock:
                self.under_way.pop(who, None)
        if not alone:
            self._say(f"{said}: {self._told(key)} after {time.perf_counter() - began:.0f} s")

    def _told(self, key: str) -> str:
        """A few words on what a run found."""
        bits = self.found["runs"].get(key, {}).get("overall")
        return "ends" if bits is None else f"{bits:.4f} bits per byte"

    def _tell(self) -> None:
        """A line on each run under way."""
        from farfield.train.report import read_log

        with self.lock:
            under_way = dict(self.under_way)
        for who, out in under_way.items():
            if log := read_log(Path(out) / "log.jsonl"):
                last = log[-1]
                speed = last.get("tokens_per_second")
                of = self.found["trained"]["steps"]
                loss = f", loss {last['loss']:.3f}" if "loss" in last else ""
                rate = f", {speed:,.0f} tokens/s" if speed else ""
                self._say(f"  {who}: step {last['step']:,} of {of:,}{loss}{rate}", style="dim")

    def _say(self, text: str, **options: Any) -> None:
        self.console.print(text, markup=False, soft_wrap=True, **options)

    def _trial(self, model: ModelConfig, config: TrainConfig, folder: Path) -> tuple[Any, ...]:
        """What measures a step, and its arguments."""
        return measure_step, model, config, folder

    def _work(self, model: ModelConfig, config: TrainConfig) -> tuple[Any, ...]:
        """What makes a run, and its arguments."""
        return learn, model, config, self.settings.scored, self.settings.lengths, self.folder, self.until

    def _keep(self, key: str, about: dict[str, Any]) -> None:
        self.found["held_out"] = about.pop("held_out", self.found.get("held_out"))
        self.found["runs"][key] = about

    def _complete(self, about: Mapping[str, Any]) -> bool:
        return about.get("overall") is not None and "cut" not in about

    def _fail(self, entry: Entry, seed: int, why: str) -> None:
        """What was scored before it failed is kept."""
        key = _key(entry, seed)
        with self.lock:
            self.found["failed"][key] = {"label": entry.label, "seed": seed, "reason": why}
            if self.found["runs"].get(key, {}).get("overall") is None:
                self.found["runs"].pop(key, None)
            self._save()
        self._say(f"  {entry.label} failed: {why}", style="yellow")

    def finish(self) -> Path:
        """Write the page, the table and the figures from what there is."""
        return report.render_comparison(self.folder)

    def say(self) -> None:
        """The table of results, and what failed."""
        if models := merged(self.found):
            title = f"\nHeld-out bits per byte after {self.found['trained']['tokens']:,} tokens"
            # the parameters are in the report: 80 columns hold the rest
            learning.print_scores(self.console, title, models, self.found["held_out"], columns(models)[:-1])
        if noise := spread(self.found):
            self.console.print(noise, style="dim")
        for one in self.found["failed"].values():
            said = f"{one['label']}, seed {one['seed']}, failed: {one['reason']}"
            self.console.print(said, style="yellow", markup=False, soft_wrap=True)

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        records.write_atomic(self.folder / self.file, json.dumps(self.found, indent=1))

    def _data(self):
        from farfield.train import open_data

        return open_data(self.text, tokens=self.settings.length, valid=self.valid)

    def _configs(self, entry: Entry, seed: int, steps: int) -> tuple[ModelConfig, TrainConfig]:
        from farfield.nn import ModelConfig
        from farfield.nn.config import known
        from farfield.train import TrainConfig

        s = self.settings
        shape = {"width": s.width, "layers": s.layers, "heads": s.heads, "kv_heads": s.kv_heads}
        shape |= dict(known(ModelConfig, s.model or {}))
        options, own = _apart(entry.options, OF_LAYERS)
        if entry.other is not None:
            other_options, of_others = _apart(entry.other[1], OF_OTHERS)
            if own:
                # those of the others stay what they would be without
                usual = ModelConfig(**shape)
                theirs = usual.other_rope_share
                own["other_rope_share"] = usual.rope_share if theirs is None else theirs
            own |= {"other": entry.other[0], "other_options": other_options, **of_others}
        shape |= own
        model = ModelConfig(**shape, attention=entry.name, attention_options=options)
        if model.other is not None and model.every > model.layers:
            raise ValueError(
                f"compare: no layer of {entry.label!r} would attend through {model.other!r}, every {model.every} "
                f"layers of {model.layers}; give it every={model.layers} or less among its options, or more layers"
            )
        config = TrainConfig(
            text=self.text, valid=self.valid, tokens=s.length, batch=s.batch, steps=steps, dtype=s.dtype,
            compile=s.compile, graph=s.graph, warmup=max(1, min(100, steps // 10)), eval_every=0, eval_windows=1,
            keep=1, log_every=max(1, steps // 100), save_every=max(1, steps // 4), device=str(self.device), seed=seed,
            out=str(self.folder / slug(f"{entry.label} seed {seed}")),
        )  # fmt: skip
        return model, replace(config, **known(TrainConfig, s.train or {}))


COLUMNS = (
    ("gap closed", "gap", ".0%"),
    ("rows read", "rows", ",.0f"),
    ("tokens/s", "speed", ",.0f"),
    ("memory", "memory_shown", ""),
    ("parameters", "parameters", ","),
)


def columns(models: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, str, str], ...]:
    """Those of COLUMNS that some model has."""
    return tuple(c for c in COLUMNS if any(m.get(c[1]) is not None for m in models.values()))


def learn(
    model: ModelConfig, config: TrainConfig, scored: int, lengths: Sequence[int], root: Path, until: float, shown: bool
) -> Iterator[dict[str, Any]]:
    """Train a model, from its checkpoint where there is one, and score it: what is told of it, before and after."""
    from farfield.train import checkpoint, copy_probe, evaluate, train

    # the code compiled for the model before is of no use to this one, and the number of codes is limited
    torch.compiler.reset()
    result = train(
        model, config, resume=bool(checkpoint.steps(config.out)), progress=shown,
        on_step=lambda _: time.time() >= until,
    )  # fmt: skip
    about = learning.trained(result, config.batch * config.tokens, root)
    if result.interrupted and time.time() < until:
        raise KeyboardInterrupt
    if result.interrupted:
        about["cut"] = result.step * config.batch * config.tokens
    about |= {
        "speed": learning.steady_speed(result),
        "rows": result.model.rows_read(config.tokens),
        "memory": learning.step_memory(result, config),
    }
    held = evaluate(result.model, result.data.valid, windows=scored, dtype=config.dtype)
    yield about | learning.scores(held) | {"held_out": learning.held_out(held)}
    decoder: Any = result.model
    about |= learning.scores(held) | {"copies": copy_probe(decoder, result.data.valid, dtype=config.dtype)}
    yield about
    for length in lengths if config.seed == 0 else ():
        if time.time() >= until:
            found = {"length": length, "failed": "not begun before the deadline"}
        else:
            found = learning.at_length(
                decoder, result.data.valid, length, config.dtype, sample=min(SAMPLE, scored * config.tokens)
            )
        about.setdefault("lengths", []).append(found)
        yield about


def measure_step(model: ModelConfig, config: TrainConfig, trial: Path, data: Source | None = None) -> Iterator[float]:
    """Seconds of a training step; the first ones compile."""
    torch.compiler.reset()
    on_gpu = torch.device(config.device).type == "cuda"
    yield learning.step_seconds(model, config, trial, data=data, first=5 if on_gpu else 1, steps=10 if on_gpu else 2)


def merged(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The finished runs by label, the mean over seeds where there are several."""
    from farfield.bench.tables import size

    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for about in found["runs"].values():
        if about.get("overall") is not None:
            # what had fewer tokens is no seed of what had them all
            cut = f", cut at {about['cut']:,} tokens" if "cut" in about else ""
            by_label.setdefault(about["label"] + cut, []).append(about)
    made = {}
    for label, several in by_label.items():
        one: dict[str, Any] = dict(several[0])
        for key in ("overall", "early", "late", "speed"):
            values = [about[key] for about in several if about[key] is not None]
            one[key] = statistics.fmean(values) if values else None
        for key in ("by_position", "by_repeat"):
            rows = zip(*(about[key] for about in several), strict=True)
            one[key] = [(row[0][0], _mean([bits for _, bits, _ in row]), row[0][2]) for row in rows]
        probes = zip(*(about.get("copies", ()) for about in several), strict=False)
        one["copies"] = [
            same[0] | {key: statistics.fmean(x[key] for x in same) for key in ("first", "second")} for same in probes
        ]
        one["seeds"] = {about["seed"]: about["overall"] for about in several}
        one["memory_shown"] = size(one["memory"])
        made[label] = one
    _add_gaps(made)
    return made


def _add_gaps(models: dict[str, dict[str, Any]]) -> None:
    """The share of the way from the near field alone, of the same width where there is one, to full attention."""
    full = models.get("full", {}).get("overall")
    floors = [m for m in models.values() if m["attention"] == "near-field" and "other" not in m]
    for m in models.values():
        near = m["options"].get("near")
        floor = next((f for f in floors if f["options"].get("near") == near), floors[0] if floors else None)
        if full is not None and floor is not None and floor["overall"] != full:
            m["gap"] = (floor["overall"] - m["overall"]) / (floor["overall"] - full)


def spread(found: Mapping[str, Any]) -> str:
    """What two seeds of one mechanism differ by, in words; empty with one seed each."""
    several = {name: list(m["seeds"].values()) for name, m in merged(found).items() if len(m["seeds"]) > 1}
    if not several:
        return ""
    each = ", ".join(f"{name} {max(x) - min(x):.4f}" for name, x in several.items())
    return f"Bits per byte between the best and the worst seed: {each}"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [x for x in values if x is not None]
    return statistics.fmean(there) if there else None


def _apart(options: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A mechanism's options, and the fields of ModelConfig among them."""
    own = {name: value for name, value in options.items() if name not in names}
    return own, {field: options[name] for name, field in names.items() if name in options}


def _key(entry: Entry, seed: int) -> str:
    return f"{entry.label} seed {seed}"


def _bytes(split) -> int:
    return len(split.ids) if split.sizes is None else int(split.sizes.sum(dtype="int64"))
