"""The demo: train, measure and sample on this machine in a few minutes, and write one page about it.

The text is on every machine: the source of Python's own standard library, some modules held out. The same small
byte-level model is trained once with each attention for equal tokens, as many as the time allows. What comes out of
every stage is in the run folder before the next one starts.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from farfield.bench import learning, records, report, runner, tables

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.nn import Decoder, ModelConfig
    from farfield.train import Data, TrainConfig

MODELS: dict[str, dict[str, Any]] = {"fma": {}, "window": {}, "full": {}}
LENGTHS = tuple(1 << p for p in range(10, 17))

# Not written by hand for this library, or repetitive tables, or tests
SKIPPED = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
    "_bundled", "lib-dynload", "turtledemo",
}  # fmt: skip

# Shares of the whole time: one baseline call at most, held-out evaluation, what is kept back for sample and page
ONE_CALL, SCORING, RESERVE = 0.1, 0.07, 0.08


@dataclass(frozen=True)
class Settings:
    """What the demo is made of; the defaults are for 5 minutes on 2 cores.

    Args:
        minutes: for everything.
        seed: of weights, order of data, and sample.
        tokens, batch: shape of a training step.
        width, layers, heads: shape of the model; its heads are width / heads wide.
        lr: of Muon.
        steps: of training; None: as many as the time allows.
        scored: held-out windows at most.
        lengths: n of the attention measurements.
        speed_heads: heads of the attention measurements.
        prompt, sample: bytes of held-out text before the sample, and bytes of the sample.
        temperature, top_p: of the sample.
    """

    minutes: float = 5.0
    seed: int = 0
    tokens: int = 2048
    batch: int = 1
    width: int = 128
    layers: int = 3
    heads: int = 2
    lr: float = 0.01
    steps: int | None = None
    scored: int = 48
    lengths: tuple[int, ...] = LENGTHS
    speed_heads: int = 1
    prompt: int = 1024
    sample: int = 400
    temperature: float = 0.6
    top_p: float = 0.95

    def __post_init__(self):
        if not self.minutes > 0:
            raise ValueError(f"demo: minutes must be positive, got {self.minutes}")
        if self.tokens < 64 or not self.lengths or self.prompt < 1 or self.sample < 0:
            raise ValueError(
                "demo: needs tokens >= 64, at least one length, prompt >= 1 and sample >= 0; "
                f"got tokens={self.tokens}, lengths={self.lengths}, prompt={self.prompt}, sample={self.sample}"
            )


def demo(
    out: Path | str = "runs/demo",
    minutes: float = 5.0,
    seed: int = 0,
    *,
    console: Console | None = None,
    **settings: Any,
) -> Path:
    """Run the demo and return the path of its page.

    Args:
        out: run folder; where it holds something already, the next free name of `out`-2, `out`-3, ... is taken.
        minutes, seed, settings: see Settings.

    Raises:
        ValueError: a setting out of range, or no source of the standard library on this machine.
        KeyboardInterrupt: Ctrl-C, after what is there has been written.
    """
    from rich.console import Console

    chosen = Settings(minutes=minutes, seed=seed, **settings)
    run = Run(free(Path(out)), chosen, console or Console(highlight=False))
    try:
        run.read_text()
        run.measure_attention()
        run.train_models()
        run.write_sample()
    except BaseException:
        if (run.folder / "demo.json").exists():
            run.console.print(f"\nStopped early. What there is: {run.finish()}", soft_wrap=True)
        raise
    page = run.finish()
    run.say_results()
    run.console.print(f"\nReport: [bold]{page}[/]", soft_wrap=True)
    return page


class Run:
    """The stages of one demo. `found` is what demo.json holds."""

    def __init__(self, folder: Path, settings: Settings, console: Console):
        self.folder, self.settings, self.console = folder, settings, console
        self.started = self.staged = time.perf_counter()
        self.stages = 0
        folder.mkdir(parents=True, exist_ok=True)
        block, near = 64, 128
        self.found: dict[str, Any] = {
            "settings": asdict(settings),
            "env": records.environment(),
            "layout": {"tokens": 1024, "block": block, "near": near, "rank": 4},
            "seconds": {},
        }
        self.save()

    @property
    def budget(self) -> float:
        """Seconds for everything."""
        return 60 * self.settings.minutes

    @property
    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.started)

    def save(self) -> None:
        records.write_atomic(self.folder / "demo.json", json.dumps(self.found, indent=1))

    def stage(self, name: str, text: str) -> None:
        self.stages += 1
        self.console.print(f"\n[bold]{self.stages}/4 {name}[/]  {text}")

    def done(self, name: str) -> None:
        """Note how long the stage took and keep what it found."""
        now = time.perf_counter()
        self.found["seconds"][name] = round(now - self.staged, 2)
        self.staged = now
        self.save()

    # ------------------------------------------------------------------------------------------------------ 1 text

    def read_text(self) -> None:
        """Write the training and the held-out text into the run folder."""
        train, valid, modules = standard_library()
        folder = self.folder / "text"
        folder.mkdir(exist_ok=True)
        sizes = [_join(files, folder / name) for files, name in ((train, "train.txt"), (valid, "valid.txt"))]
        self.found["text"] = {
            "train_bytes": sizes[0],
            "valid_bytes": sizes[1],
            "train_files": len(train),
            "valid_files": len(valid),
            "modules": modules,
        }
        self.stage(
            "Text",
            f"Python's standard library: {sizes[0]:,} bytes in {len(train)} files to learn from, {sizes[1]:,} bytes in "
            f"{len(valid)} files held out",
        )
        self.done("text")

    # ----------------------------------------------------------------------------------------------- 2 measurements

    def measure_attention(self) -> None:
        """Time and memory of one attention call against SDPA, one record a point."""
        s = self.settings
        self.stage("Attention", f"fma against SDPA, {min(s.lengths):,} to {max(s.lengths):,} tokens, float32")
        options = {k: v for k, v in _defaults("fma").items() if k in ("block", "near", "rank")}
        made: list[records.Record] = []

        def keep(record: records.Record) -> None:
            made.append(record)
            records.append(self.folder / "speed.jsonl", record)

        with self.console.status("") as status:
            runner.run(
                "fma",
                dtypes=("float32",),
                # a few rounds of what is short, one call of what is not
                seconds=self.budget / 400,
                most=7,
                once=self.budget / 150,
                max_baseline_seconds=self.budget * ONE_CALL,
                out=None,
                progress=status.update,
                on_record=keep,
                tokens=list(s.lengths),
                heads=s.speed_heads,
                width=s.width // s.heads,
                **options,
            )
        self.console.print(tables.table(made))
        for note in tables.notes(made):
            self.console.print(note, style="yellow", markup=False, soft_wrap=True)
        self.done("attention")

    # --------------------------------------------------------------------------------------------------- 3 training

    def train_models(self) -> None:
        """The same model with each attention, for equal tokens."""
        from farfield.train import evaluate, train

        s = self.settings
        rates = {}
        with self.console.status("measuring the speed of a training step"):
            for name in MODELS:
                rates[name] = self._step_seconds(name)
        a_round = sum(rates.values())
        # a forward is about a third of a step
        per_window = a_round / 3 / s.batch
        scored = max(2, min(s.scored, int(self.budget * SCORING / per_window)))
        available = self.left - scored * per_window - self.budget * RESERVE
        steps = s.steps or max(4, int(0.9 * available / a_round))
        size = s.batch * s.tokens
        self.found["trained"] = {"steps": steps, "bytes": steps * size, "batch": s.batch, "tokens": s.tokens}
        self.stage(
            "Training",
            f"{', '.join(MODELS)}: {steps * size:,} bytes each, {steps:,} steps of {s.batch} x {s.tokens:,}",
        )
        self.found["models"] = {}
        for name in MODELS:
            model, config = self._configs(name, steps)
            self.console.print(f"  {name}")
            began = time.perf_counter()
            result = train(model, config, progress=True)
            took = time.perf_counter() - began
            about: dict[str, Any] = {"folder": name, **learning.trained(result, size, self.folder)}
            about["speed"] = result.step * size / took
            self.found["models"][name] = about
            shape = model.to_dict()
            self.found["model"] = learning.plain(shape, drop=("attention", "attention_options", "kind"))
            self.found["train"] = learning.recipe(config)
            self.save()
            if result.interrupted:
                raise KeyboardInterrupt
            held = evaluate(result.model, result.data.valid, windows=scored)
            self.found["held_out"] = learning.held_out(held)
            about |= learning.scores(held)
            self.save()
        self.done("training")

    def _configs(self, name: str, steps: int) -> tuple[ModelConfig, TrainConfig]:
        from farfield.nn import ModelConfig
        from farfield.train import TrainConfig

        s = self.settings
        model = ModelConfig(
            width=s.width, layers=s.layers, heads=s.heads, attention=name, attention_options=MODELS[name]
        )
        config = TrainConfig(
            text=(str(self.folder / "text" / "train.txt"),),
            valid=(str(self.folder / "text" / "valid.txt"),),
            cache=str(self.folder / "text" / "cache"),
            tokens=s.tokens,
            batch=s.batch,
            steps=steps,
            lr=s.lr,
            warmup=max(1, min(100, steps // 10)),
            seed=s.seed,
            device="cpu",
            out=str(self.folder / name),
            log_every=max(1, steps // 100),
            eval_every=0,
            eval_windows=1,
            save_every=0,
            keep=1,
        )
        return model, config

    def _step_seconds(self, name: str) -> float:
        """Duration of a training step."""
        model, config = self._configs(name, 1000)
        return learning.step_seconds(model, config, self.folder / f".trial-{name}")

    # ----------------------------------------------------------------------------------------------------- 4 sample

    def write_sample(self) -> None:
        """Text from the fma model: held-out text as the prompt, then byte by byte from its state."""
        from farfield.train import generate, load_codec, load_model, open_data, stream_text

        s = self.settings
        where = self.folder / self.found["models"]["fma"]["checkpoint"]
        model: Any = load_model(where)[0]
        codec = load_codec(where)
        _, config = self._configs("fma", 1)
        data: Data = open_data(config.text, tokens=s.tokens, valid=config.valid, cache=config.cache)
        prompt = _prompt(data, s.prompt)
        self.stage(
            "Sample", f"up to {s.sample} bytes from the fma model's state, after {len(prompt):,} of held-out text\n"
        )
        shown = codec.decode(prompt)[-160:]
        self.console.print(f"... {tables.visible(shown)}", end="", style="dim", markup=False, soft_wrap=True)
        text, made, began = "", 0, time.perf_counter()
        latest = began + max(0.75 * self.budget * RESERVE, self.left - 0.25 * self.budget * RESERVE)

        def in_time(tokens: Iterator[int]) -> Iterator[int]:
            nonlocal made
            for token in tokens:
                made += 1
                yield token
                if time.perf_counter() > latest:
                    return

        tokens = generate(
            model, prompt, new_tokens=s.sample, temperature=s.temperature, top_p=s.top_p, seed=s.seed, chunk=256
        )
        for piece in stream_text(codec, in_time(tokens)):
            text += piece
            self.console.print(tables.visible(piece), end="", markup=False, soft_wrap=True)
        took = time.perf_counter() - began
        self.console.print()
        self.found["sample"] = {
            "prompt": codec.decode(prompt)[-600:],
            "text": text,
            "prompt_tokens": len(prompt),
            "new_tokens": made,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "speed": made / took,
            "state_bytes": _state_bytes(model, prompt),
        }
        self.done("sample")

    # -------------------------------------------------------------------------------------------------------- page

    def finish(self) -> Path:
        """Write the page from what there is."""
        self.found["env"]["load"] = [self.found["env"]["load"], records.load_average()]
        self.found["seconds"]["all"] = round(time.perf_counter() - self.started, 2)
        self.save()
        return report.render(self.folder)

    def say_results(self) -> None:
        """The table of held-out results."""
        title = f"\nHeld-out bits per byte after {self.found['trained']['bytes']:,} bytes"
        speed = [("bytes/s", "speed", ",.0f")]
        learning.print_scores(self.console, title, self.found["models"], self.found["held_out"], speed)


def standard_library(root: Path | str | None = None) -> tuple[list[Path], list[Path], list[str]]:
    """Files to learn from, files held out, and the held-out modules, of Python's own source.

    About a tenth of the top-level modules and packages is held out as a whole, picked by a hash of the name: the same
    ones on every machine.

    Raises:
        ValueError: there is no source there.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    train, valid, held = [], [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        module = parts[0].removesuffix(".py")
        if hashlib.sha256(module.encode()).digest()[0] % 10 == 0:
            valid.append(path)
            held.add(module)
        else:
            train.append(path)
    if not train or not valid:
        raise ValueError(
            f"demo: no source of Python's standard library in {root}; install Python with its library as .py files"
        )
    return train, valid, sorted(held)


def _join(files: Sequence[Path], path: Path) -> int:
    """One file after another, as they are; returns the bytes written."""
    text = b"\n".join(f.read_bytes() for f in files)
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(text)
    partial.replace(path)
    return len(text)


def _prompt(data: Data, size: int) -> list[int]:
    """Held-out text from the middle, up to a line's end."""
    ids = data.valid.ids
    start = max(0, len(ids) // 2 - size)
    taken = ids[start : start + size].tolist()
    ends = [i for i, x in enumerate(taken) if x == ord("\n")]
    return taken[: ends[-1] + 1] if ends else taken


def _state_bytes(model: Decoder, prompt: Sequence[int]) -> int:
    with torch.no_grad():
        _, state = model.eval().extend(torch.tensor([list(prompt)]))
    return state.nbytes


def _defaults(name: str) -> dict[str, Any]:
    """The mechanism's own default options, with the demo's on top."""
    import inspect

    from farfield import mechanisms

    parameters = inspect.signature(mechanisms.get(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | MODELS[name]


def free(folder: Path) -> Path:
    """`folder`, or the next numbered name that holds nothing yet."""
    number, name = 1, folder
    while name.exists() and (not name.is_dir() or any(name.iterdir())):
        number += 1
        name = folder.with_name(f"{folder.name}-{number}")
    return name
