"""The runner: what a benchmark case does not have to do itself.

A case says what is run and what it costs on paper; the runner checks the result, times it interleaved with its
baselines, reads peak memory, records every point with its machine and commit, and prints the table.

    @bench("attend-window", over={"tokens": [1 << p for p in range(12, 18)]}, against="sdpa")
    def attend_window(tokens, device, dtype, block=128, width=8):
        q, k, v = draw(tokens, device, dtype)
        ...
        return Work(call=lambda: attend(q, Rows(k, v), layout).out, flops=..., bytes=..., inputs=(q, k, v))

Interleaving: every round runs every contender once, the order turning by one each round, and the ratio is taken
within a round before the median over rounds, so that a slow minute of the machine meets all contenders alike.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield.bench import memory
from farfield.bench.records import Record, append, environment, load_average, machine_name, results_path

PASSES = ("forward", "forward+backward")
ALL_PASSES = (*PASSES, "backward")
STEP = ("step",)  # for cases whose call is not differentiated by the runner
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# A call this long, after whatever is compiled or loaded, is the one sample there is
ONCE = {"cpu": 60.0, "cuda": 1.0}

# GPU calls from this on are timed one by one; of shorter ones each round makes many
LONG = 0.03

# bytes/s and flop/s that a machine was seen to reach: a large copy, and a bfloat16 product of 8192 x 8192 x 8192
CEILINGS = {"h200": (4.3e12, 790e12)}


@dataclass(frozen=True)
class Work:
    """One thing to time, and what it costs on paper.

    Args:
        call: computes the output; with passes of "step", does the whole step.
        flops: of the forward or the step, over the area really read; multiply and add count as two.
        bytes: of the forward: inputs read once, outputs written once.
        inputs: q, k, v: what the backward differentiates and the baselines get.
        check: compares a result with a reference, before anything is timed, and returns what was compared. Called with
            the passes; raises AssertionError.
        backend: the implementation that runs, where there are several.
        causal: for the baselines.
        shape: of the output, where it is not q's.
        rivals: baselines of this case alone, by name; made when their turn comes.
        repeat: how often one call does the work; times are divided by it.
        setup: seconds that building what the call takes as given took.
        floor: passes -> bytes and flops that no implementation can do without.
        rates: (passes, seconds, {baseline: its seconds}) -> named numbers for the record.
    """

    call: Callable[[], Tensor]
    flops: float | None = None
    bytes: float | None = None
    inputs: tuple[Tensor, ...] = ()
    check: Callable[[str], Mapping[str, Any]] | None = None
    backend: str = ""
    causal: bool = True
    shape: tuple[int, ...] | None = None
    rivals: Mapping[str, Callable[[], Work]] = field(default_factory=dict)
    repeat: int = 1
    setup: float | None = None
    floor: Callable[[str], tuple[float, float]] | None = None
    rates: Callable[[str, float, Mapping[str, float]], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Bench:
    """A registered case. `axis` is what a figure draws along; `dtypes` and `passes` are what a plain run measures, and
    `longest` the seconds that a call of a baseline takes at most in one.
    """

    name: str
    make: Callable[..., Work]
    over: Mapping[str, Sequence[Any]]
    against: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    passes: tuple[str, ...] = PASSES
    axis: str = "tokens"
    longest: float = math.inf

    @property
    def about(self) -> str:
        """First line of the case's docstring."""
        return (inspect.getdoc(self.make) or "").partition("\n")[0]


BENCHES: dict[str, Bench] = {}
BASELINES: dict[str, Callable[[tuple[Tensor, ...], bool], Work]] = {}


def bench(
    name: str,
    *,
    over: Mapping[str, Sequence[Any]],
    against: str | Sequence[str] = "sdpa",
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    passes: Sequence[str] = PASSES,
    axis: str = "tokens",
    longest: float = math.inf,
):
    """Register a case: a function (tokens, device, dtype, **options) -> Work.

    Args:
        over: the default grid, tokens first; `run` can replace it.
        against: baselines, by their names in `baseline` or in the work's `rivals`.
        dtypes, passes: what a plain run measures. Passes of ("step",) run the call as it is.
        axis: the option that figures draw along.
        longest: a baseline's call that is expected to take more seconds is skipped in a plain run.
    """

    def register(make: Callable[..., Work]) -> Callable[..., Work]:
        rivals = (against,) if isinstance(against, str) else tuple(against)
        BENCHES[name] = Bench(name, make, over, rivals, tuple(dtypes), tuple(passes), axis, longest)
        return make

    return register


def baseline(name: str):
    """Register a baseline: a function (inputs, causal) -> Work on the same tensors."""

    def register(make: Callable[[tuple[Tensor, ...], bool], Work]):
        BASELINES[name] = make
        return make

    return register


@dataclass
class Timing:
    """Samples of one contender.

    Args:
        rounds: seconds, one list a round.
        usage: memory of one call.
        error: why there are no samples.
    """

    rounds: list[list[float]] = field(default_factory=list)
    usage: memory.Usage | None = None
    error: str = ""

    @property
    def samples(self) -> list[float]:
        return [x for one in self.rounds for x in one]

    def summary(self) -> dict[str, float]:
        """Seconds: min, q10, median, q90, max; and the number of samples and rounds."""
        if not self.samples:
            return {}
        xs = torch.tensor(self.samples, dtype=torch.float64)
        q10, median, q90 = xs.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return {
            "min": min(self.samples),
            "q10": q10,
            "median": median,
            "q90": q90,
            "max": max(self.samples),
            "samples": len(self.samples),
            "rounds": len(self.rounds),
        }


def ratio(base: Timing, own: Timing) -> float | None:
    """Median over common rounds of the baseline's time over own time, each the median of its round."""
    pairs = list(zip(base.rounds, own.rounds, strict=False))
    return statistics.median(statistics.median(b) / statistics.median(o) for b, o in pairs) if pairs else None


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 5.0,
    most: int = 30,
    once: float | None = None,
) -> dict[str, Timing]:
    """Time several calls interleaved; a call that raises keeps its reason and the others go on.

    The first call of each warms up, reads memory and tells how many rounds fit into `seconds`. A first call longer
    than `once` is also its only sample; on the GPU, where the first ones may compile or record (a recording is made at
    the second call), one of the next three: what a call costs decides how it is timed.

    Args:
        seconds: for all rounds together; three rounds are made if they take no more than three times as long.
        most: rounds at most.
    """
    device = torch.device(device)
    once = ONCE[device.type] if once is None else once
    found = {name: Timing() for name in calls}
    cost = {}
    for name, call in calls.items():
        try:
            usage = memory.measure(call, device)
            # the first call also loads code and fills caches; on a GPU the second may compile as long, to be recorded
            for turn in range(3 if device.type == "cuda" else int(usage.seconds < 1.0)):
                before, usage = usage, memory.measure(call, device)
                if turn and once <= usage.seconds >= 0.9 * before.seconds:
                    break
        except Exception as error:
            found[name].error = reason(error)
            continue
        found[name].usage = usage
        if usage.seconds >= once:
            found[name].rounds = [[usage.seconds]]
        else:
            cost[name] = usage.seconds
    # a contender that has its only sample already is compared with the first round of the others
    each = sum(cost.values())
    rounds = min(most, int(seconds / each)) if each > 0 else most
    rounds = max(rounds, 3 if 3 * each <= 3 * seconds else 1)
    if device.type == "cuda":
        rounds = min(rounds, 5)
    longest = max((t.usage.seconds for t in found.values() if t.usage), default=0.0)
    order = list(cost)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)] if order else ():
            if found[name].error:
                continue
            # few rounds: short contenders repeat within theirs, so that one hiccup does not decide
            repeats = 1 if rounds >= 5 else max(1, min(3, int(longest / max(cost[name], 1e-9) / 2)))
            try:
                found[name].rounds.append(_samples(calls[name], device, repeats, cost[name]))
            except Exception as error:
                found[name].error, found[name].rounds = reason(error), []
    return found


def _samples(call: Callable[[], object], device: torch.device, repeats: int, cost: float) -> list[float]:
    if device.type == "cuda" and cost < LONG:
        from triton.testing import do_bench

        return [ms / 1e3 for ms in do_bench(call, warmup=10, rep=50, return_mode="all") or ()]
    if device.type == "cuda":
        return [_between_events(call) for _ in range(repeats)]
    taken, collecting = [], gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return taken


def _between_events(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def reason(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def run(
    name: str,
    *,
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    passes: Sequence[str] | None = None,
    against: Sequence[str] | None = None,
    seconds: float = 5.0,
    most: int = 30,
    once: float | None = None,
    max_baseline_seconds: float | None = None,
    out: Path | str | None = "results",
    progress: Callable[[str], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    **grid: Any,
) -> list[Record]:
    """Run a benchmark over its grid and record every point.

    Args:
        name: a registered case, or any mechanism.
        dtypes, passes: what to measure of each point; the case's by default.
        against: the baselines to measure, in place of all of the case's.
        seconds, most, once: see `compare`.
        max_baseline_seconds: a baseline whose call is expected to take longer, going by its time at the length before,
            is skipped and recorded as skipped; the case's `longest` by default.
        out: folder of results, None records nothing.
        progress: called with what is being measured.
        on_record: called with every record as it is made.
        grid: replaces parts of the case's grid and its options; a list is swept, anything else is fixed.

    Raises:
        ValueError: no such benchmark, option, dtype, passes or device.
    """
    from farfield import mechanisms

    case = get(name)
    where = _device(device)
    dtypes, passes = dtypes or case.dtypes, passes or case.passes
    longest = case.longest if max_baseline_seconds is None else max_baseline_seconds
    allowed = STEP if case.passes == STEP else ALL_PASSES
    rivals = () if against is None else against
    for what, given, known in (
        ("dtype", dtypes, DTYPES),
        ("passes", passes, allowed),
        ("baseline", rivals, {*BASELINES, *case.against}),
    ):
        if bad := [x for x in given if x not in known]:
            raise ValueError(f"bench {name}: no {what} {bad[0]!r}; there are {', '.join(sorted(known))}")
    if against is not None:
        case = replace(case, against=tuple(against))
    options = inspect.signature(case.make).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in options.values())
    if not takes_any and (bad := [x for x in grid if x not in options or x in ("device", "dtype")]):
        known = [x for x in options if x not in ("device", "dtype")]
        raise ValueError(f"bench {name}: no option {bad[0]!r}; its options are {', '.join(known)}")
    if name not in BENCHES:
        mechanisms.check_options(name, [x for x in grid if x not in options and x != "width"])
    axes = {k: list(v) if isinstance(v, (list, tuple, range)) else [v] for k, v in {**case.over, **grid}.items()}

    made: list[Record] = []
    past: dict[tuple[str, str, str], tuple[int, float]] = {}
    # the longest lengths last, in all passes: a run that is stopped has left the fewest out
    for dtype, point, which in itertools.product(dtypes, itertools.product(*axes.values()), passes):
        params = dict(zip(axes, point, strict=True))
        if progress:
            rest = "".join(f" {key}={value}" for key, value in params.items() if key != "tokens")
            progress(f"{name} {which} {dtype} n={params['tokens']}{rest}")
        for record in _point(case, params, where, dtype, which, seconds, most, once, longest, past):
            made.append(record)
            if out is not None:
                append(results_path(name, out, where), record)
            if on_record:
                on_record(record)
    return made


def _point(
    case: Bench, params: dict[str, Any], device: torch.device, dtype: str, which: str,
    seconds: float, most: int, once: float | None, max_baseline: float,
    past: dict[tuple[str, str, str], tuple[int, float]],
) -> list[Record]:  # fmt: skip
    """All contenders at one point. `past` holds each baseline's last (tokens, seconds)."""
    tokens = params["tokens"]
    env = environment(device)
    blank = Record(case.name, case.name, which, dtype, params)
    try:
        torch.manual_seed(0)
        works = {case.name: case.make(device=device, dtype=DTYPES[dtype], **params)}
    except Exception as error:
        return [replace(blank, status="failed", reason=reason(error), env=env)]
    own = works[case.name]
    records = {
        case.name: replace(blank, backend=own.backend, flops=_flops(own, which), bytes=own.bytes, setup=own.setup)
    }
    for other in case.against:
        records[other] = replace(blank, contender=other)
        known = past.get((other, dtype, which))
        expected = known[1] * (tokens / known[0]) ** 2 if known else 0.0
        if expected > max_baseline:
            why = f"expected to take {expected:.0f} s, more than the {max_baseline:g} s allowed"
            records[other] = replace(records[other], status="skipped", reason=why)
            continue
        try:
            rival = own.rivals.get(other)
            made = works[other] = rival() if rival else BASELINES[other](own.inputs, own.causal)
            records[other] = replace(
                records[other], backend=made.backend, flops=_flops(made, which), bytes=made.bytes, setup=made.setup
            )
        except Exception as error:
            records[other] = replace(records[other], status="failed", reason=reason(error))

    if own.check:
        try:
            records[case.name] = replace(records[case.name], check=dict(own.check(which)))
        except Exception as error:
            # what is wrong is not timed; its baselines are
            records[case.name] = replace(records[case.name], status="failed", reason=f"check: {reason(error)}")
            del works[case.name]
    d_out = None
    differentiated = which not in ("forward", *STEP)
    if differentiated and works:
        like = own.inputs[0]
        d_out = torch.randn(own.shape or like.shape, dtype=like.dtype, device=device)
    for x in own.inputs:
        x.requires_grad_(differentiated)
    calls = {who: _call(work, which, d_out) for who, work in works.items()}
    timings = compare(calls, device=device, seconds=seconds, most=most, once=once)
    for who, timing in timings.items():
        timing.rounds = [[x / works[who].repeat for x in one] for one in timing.rounds]
    env = {**env, "load": [env["load"], load_average()]}
    took = {who: statistics.median(t.samples) for who, t in timings.items() if t.samples}
    others = {who: x for who, x in took.items() if who != case.name}
    for who, record in records.items():
        if (timing := timings.get(who)) is None:
            continue
        usage = timing.usage
        base = next((b for b in case.against if b in timings and timings[b].rounds), None)
        against = base if who == case.name and not timing.error else None
        records[who] = replace(
            record,
            status="failed" if timing.error else "ok",
            reason=timing.error,
            times=timing.summary(),
            memory=usage.peak if usage else None,
            rss=usage.rss if usage else None,
            against=against,
            ratio=ratio(timings[against], timing) if against else None,
        )
        if (mine := took.get(who)) is None:
            continue
        work = works[who]
        records[who] = replace(
            records[who],
            ratios={} if who != case.name else {b: r for b in others if (r := ratio(timings[b], timing)) is not None},
            floor=_floor(work, which, mine, device),
            rates=dict(work.rates(which, mine, others)) if work.rates else {},
        )
        if who in case.against and timing.rounds:
            past[who, dtype, which] = (tokens, statistics.median(timing.samples))
    del works, own, d_out, timings, calls
    # a failed call leaves its tensors in a cycle with its traceback
    gc.collect(1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [replace(r, env=env) for r in records.values()]


def _call(work: Work, which: str, d_out: Tensor | None) -> Callable[[], object]:
    made: list[Tensor] = []

    def forward() -> object:
        with torch.no_grad():
            return work.call()

    def both() -> object:
        return torch.autograd.grad(work.call(), work.inputs, d_out)

    def backward() -> object:
        if not made:
            made.append(work.call())
        return torch.autograd.grad(made[0], work.inputs, d_out, retain_graph=True)

    return {"forward": forward, "forward+backward": both, "backward": backward}.get(which, work.call)


def _flops(work: Work, which: str) -> float | None:
    """The backward makes five products where the forward makes two."""
    times = {"forward+backward": 3.5, "backward": 2.5}.get(which, 1.0)
    return work.flops if work.flops is None else times * work.flops


def _floor(work: Work, which: str, seconds: float, device: torch.device) -> dict[str, float]:
    """What the work cannot do without, in the time that this machine's ceilings leave for it."""
    ceilings = CEILINGS.get(machine_name(device))
    if work.floor is None or ceilings is None:
        return {}
    moved, flops = work.floor(which)
    least = max(moved / ceilings[0], flops / ceilings[1])
    return {
        "bytes": moved,
        "flops": flops,
        "bytes/s": ceilings[0],
        "flop/s": ceilings[1],
        "seconds": least,
        "share": least / seconds,
    }


def _device(device: str) -> torch.device:
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"bench: no device {device!r}; there are cpu and cuda") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: this PyTorch sees no CUDA device; use --device cpu")
    return where


def get(name: str) -> Bench:
    """The case of this name; a mechanism without a case of its own gets a generic one.

    Raises:
        ValueError: no such benchmark or mechanism.
    """
    from farfield import mechanisms

    _discover()
    if name in BENCHES:
        return BENCHES[name]
    if name in mechanisms.names():
        return _generic(name)
    raise ValueError(f"no benchmark {name!r}; there are {', '.join(names())}")


def names() -> tuple[str, ...]:
    """Every benchmark: the registered cases and all mechanisms."""
    from farfield import mechanisms

    _discover()
    return tuple(sorted({*BENCHES, *mechanisms.names()}))


@cache
def _discover() -> None:
    """Import every case: each module of this package that is not part of the machinery registers itself."""
    import farfield.bench as package

    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in package.MACHINERY:
            importlib.import_module(f"{package.__name__}.{module.name}")


def draw(
    tokens: int, device: torch.device | str, dtype: torch.dtype, *, heads: int = 4, kv_heads: int | None = None,
    width: int = 64, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normal q, k, v of one sequence, the same numbers for every dtype."""
    gen = torch.Generator(device).manual_seed(seed)
    shapes = [(1, h, tokens, width) for h in (heads, kv_heads or heads, kv_heads or heads)]
    q, k, v = (torch.randn(s, generator=gen, device=device).bfloat16().to(dtype) for s in shapes)
    return q, k, v


def timed(make: Callable[[], Any], device: torch.device | str) -> tuple[Any, float]:
    """What `make` gives the second time, and the seconds that took: for `Work.setup`."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    make()
    wait()
    start = time.perf_counter()
    made = make()
    wait()
    return made, time.perf_counter() - start


def _generic(name: str) -> Bench:
    """Any mechanism with its defaults: nothing on paper, no reference beyond the contract tests."""
    from farfield import mechanisms

    own = mechanisms.own_width(name)

    def make(tokens, device, dtype, heads=4, kv_heads=None, head_width=64, causal=True, **options) -> Work:
        # a window's width is its own
        head_width = head_width if own else options.pop("width", head_width)
        q, k, v = draw(tokens, device, dtype, heads=heads, kv_heads=kv_heads, width=head_width)
        mechanism = mechanisms.make(name, causal=causal, **options).to(device, dtype)
        return Work(call=lambda: mechanism(q, k, v), bytes=2 * (q.nbytes + v.nbytes), inputs=(q, k, v), causal=causal)

    make.__doc__ = f"The mechanism {name} with its defaults, against SDPA."
    return Bench(name, make, {"tokens": [1 << p for p in range(10, 15)]}, ("sdpa",))


# ---------------------------------------------------------------------------------------------------------- baselines


@baseline("sdpa")
def sdpa(inputs: tuple[Tensor, ...], causal: bool) -> Work:
    """PyTorch's scaled_dot_product_attention: cuDNN on the GPU where it runs, and what PyTorch picks on the CPU."""
    return _sdpa(inputs, causal, "CUDNN_ATTENTION" if inputs[0].is_cuda else None)


@baseline("sdpa-flash")
def sdpa_flash(inputs: tuple[Tensor, ...], causal: bool) -> Work:
    """The same with FlashAttention-2 prescribed."""
    return _sdpa(inputs, causal, "FLASH_ATTENTION")


def _sdpa(inputs: tuple[Tensor, ...], causal: bool, backend: str | None) -> Work:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = inputs
    grouped = q.shape[1] != k.shape[1]
    chosen = getattr(SDPBackend, backend) if backend else None
    if chosen is None:
        number = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
            q, k, v, None, 0.0, causal, enable_gqa=grouped
        )
        name = SDPBackend(number).name
    else:
        name = chosen.name

    def call() -> Tensor:
        with sdpa_kernel([chosen]) if chosen is not None else nullcontext():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    tokens, rows = q.shape[2], k.shape[2]
    pairs = tokens * (tokens + 1) / 2 if causal else tokens * rows
    return Work(
        call=call,
        flops=2 * q.shape[0] * q.shape[1] * (q.shape[3] + v.shape[3]) * pairs,
        bytes=sum(x.nbytes for x in inputs) + q.nbytes // q.shape[3] * v.shape[3],
        inputs=inputs,
        backend=name.lower(),
        causal=causal,
    )


# ---------------------------------------------------------------------------------------------------------- read-outs


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of y in x: least squares through the logarithms. nan with fewer than two points."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len(points) < 2:
        return float("nan")
    mean_a, mean_b = (statistics.fmean(c) for c in zip(*points, strict=True))
    spread = sum((a - mean_a) ** 2 for a, _ in points)
    return sum((a - mean_a) * (b - mean_b) for a, b in points) / spread if spread else float("nan")


def memory_slopes(records: Sequence[Record], longest: int = 4) -> dict[tuple[str, str, str], float]:
    """Exponent of peak memory in n for each (contender, passes, dtype) measured at two lengths or more.

    Fitted to the `longest` longest ones: short calls are dominated by buffers of a fixed size, which would flatter it.
    """
    lines: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for r in records:
        if r.memory:
            lines.setdefault((r.contender, r.passes, r.dtype), []).append((r.tokens, r.memory))
    return {
        key: slope(*zip(*sorted(points)[-longest:], strict=True)) for key, points in lines.items() if len(points) > 1
    }
