"""Every mechanism at the same lengths: time, memory, and what of the dense time its share of the pairs would take.

    efficiency = (causal SDPA's time / own time) * (rows read per query / rows that causal attention reads)

1 is a mechanism whose choosing, planning and summarizing cost nothing and that reads its rows as fast as the dense
kernel reads all of them. Everything that a call does counts; mechanisms have the options that are their defaults.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield import mechanisms
from farfield.bench import runner
from farfield.bench.records import Record, append, environment, latest, load, results_path
from farfield.bench.runner import PASSES, Work, bench, draw
from farfield.bench.worker import Worker, WorkError

NAME = "mechanisms"
GROUPS = 4  # key heads at most, of mechanisms whose paper groups the heads
CHECKED, CHECKED_HEADS = 2039, 2  # tokens and query heads of the comparison with the reference; the length is a prime
GRIDS: dict[str, dict[str, Any]] = {
    "cuda": {"tokens": [1 << 13, 1 << 15, 1 << 17], "width": [64, 128], "heads": 16, "dtypes": ["bfloat16"]},
    "cpu": {"tokens": [1 << 10, 1 << 11, 1 << 12], "width": [64], "heads": 4, "dtypes": ["float32"]},
}
"""What a plain run measures on which kind of device."""

_CHECKED: dict[Any, Mapping[str, Any] | AssertionError] = {}


@dataclass(frozen=True)
class Plan:
    """What to measure of each mechanism; lists are swept."""

    tokens: Sequence[int]
    width: Sequence[int]
    heads: int
    kv_heads: int | None = None
    dtypes: Sequence[str] = ("bfloat16",)
    passes: Sequence[str] = PASSES


@bench(NAME, over={"tokens": GRIDS["cpu"]["tokens"], "width": [64], "mechanism": ["fma"]})
def mechanism(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    mechanism: str = "fma",
    width: int = 64,
    heads: int = 16,
    kv_heads: int | None = None,
    own_width: int | None = None,
    **options: Any,
) -> Work:
    """Every registered mechanism with its defaults against causal SDPA: time, memory, efficiency, break-even."""
    options |= {} if own_width is None else {"width": own_width}
    kind = mechanisms.get(mechanism)
    kv_heads = kv_heads or key_heads(mechanism, heads)
    q, k, v = draw(tokens, device, dtype, heads=heads, kv_heads=kv_heads, width=width)
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width}
    made = mechanisms.make_for(mechanism, {**options, "causal": True}, **sizes).to(device)
    rows = made.rows_read(tokens)

    def call() -> Tensor:
        return made.train(torch.is_grad_enabled())(q, k, v)

    def rates(passes: str, seconds: float, others: Mapping[str, float]) -> dict[str, float]:
        read = {} if rows is None else {"rows": rows, "read": rows / ((tokens + 1) / 2)}
        return {"tokens/s": tokens / seconds, **read}

    return Work(
        call=call,
        flops=None if rows is None else 4.0 * heads * width * rows * tokens,
        bytes=2 * (q.nbytes + k.nbytes),
        inputs=(q, k, v),
        check=lambda passes: check_once(kind.__module__, mechanism, options, sizes, dtype, device, passes),
        rates=rates,
    )


def key_heads(name: str, heads: int) -> int:
    """Key heads that a mechanism is measured with: as its paper has them, up to GROUPS where it groups."""
    return min(GROUPS, heads) if mechanisms.get(name).grouped else heads


def check_once(
    module: str, name: str, options: Mapping[str, Any], sizes: Mapping[str, int], dtype: torch.dtype,
    device: torch.device | str, passes: str,
) -> Mapping[str, Any]:  # fmt: skip
    """`check`, at the first of the points that differ in their length only."""
    key = (module, repr(sorted(options.items())), tuple(sizes.values()), dtype, str(device), passes)
    if key not in _CHECKED:
        try:
            _CHECKED[key] = check(name, options, dtype, device, passes, **sizes)
        except AssertionError as error:
            _CHECKED[key] = error
    found = _CHECKED[key]
    if isinstance(found, AssertionError):
        raise AssertionError(str(found))
    return found


def check(
    name: str, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str, passes: str,
    *, heads: int, kv_heads: int, width: int, tokens: int | None = None,
) -> Mapping[str, Any]:  # fmt: skip
    """Compare a short sequence, and with a backward its gradients, with the mechanism's reference in float64.

    Raises:
        AssertionError: an error is larger than the dtype allows.
    """
    import copy

    from farfield.testing.units import error_units

    tokens = CHECKED if tokens is None else tokens

    # one group of heads says as much as all of them, in a fraction of the time
    repeat = heads // kv_heads
    few = {"heads": max(CHECKED_HEADS, repeat), "kv_heads": max(CHECKED_HEADS // repeat, 1), "width": width}
    own = draw(tokens, device, dtype, **few)
    made = mechanisms.make_for(name, {**options, "causal": True}, **few).to(device)
    wide = copy.deepcopy(made).double()
    exactly = [x.double().requires_grad_(passes != "forward") for x in own]
    with exactly[0].device:  # references name no device
        exact = wide.reference(*exactly)
    if passes == "forward":
        with torch.no_grad():
            errors = {"out": error_units(made.eval()(*own), exact, terms=tokens)}
    else:
        own = [x.requires_grad_() for x in own]
        out = made(*own)
        (given, *_) = draw(tokens, device, dtype, **few, seed=99)
        errors = {"out": error_units(out, exact, terms=tokens)}
        grads = torch.autograd.grad(out, own, given), torch.autograd.grad(exact, exactly, given.double())
        errors |= {
            d: error_units(a, b, terms=tokens) for d, a, b in zip(("dq", "dk", "dv"), *grads, strict=True)
        }  # fmt: skip
    for what, units in errors.items():
        assert units <= 3.0, f"{what} is off by {units:.1f} units at n={tokens}, 3 allowed"
    return {"tokens": tokens, "heads": few["heads"], "units": {name: round(x, 3) for name, x in errors.items()}}


def run_all(
    chosen: Sequence[tuple[str, Mapping[str, Any]]],
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    against: Sequence[str] | None = None,
    seconds: float = 5.0,
    max_baseline_seconds: float = math.inf,
    limit: float = math.inf,
    own_process: bool | None = None,
    resume: bool = False,
    out: Path | str | None = "results",
    progress: Callable[[str], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Measure each mechanism at each point; one that fails is recorded with its reason, and the next one follows.

    Records have the bench "mechanisms", and as contender the mechanism or the baseline beside it.

    Args:
        chosen: (registry name, options) of each.
        against, seconds, max_baseline_seconds: see `runner.run`.
        limit: seconds a point may take, in a process of its own.
        own_process: measure in another process, which a fault may take down; by default on the GPU.
        resume: points that are in the records already, and are not failed, are returned from there.
        out: folder of results, None records nothing.
        progress: called with what is being measured.
        on_record: called with every new record.
    """
    device = torch.device(device)
    known: dict[Any, Record] = {}
    if out is not None and resume and (path := results_path(NAME, out, device)).exists():
        known = {_key(r): r for r in latest(load(path)) if r.status == "ok"}
    found: list[Record] = []

    def keep(record: Record) -> None:
        found.append(record)
        if out is not None:
            append(results_path(NAME, out, device), record)
        if on_record:
            on_record(record)

    isolated = device.type == "cuda" if own_process is None else own_process
    points = itertools.product(chosen, plan.dtypes, plan.width, plan.passes, plan.tokens)
    lost: dict[Any, str] = {}
    with Worker(own=isolated, limit=limit) as worker:
        for (name, options), dtype, width, passes, tokens in points:
            heads = {"heads": plan.heads, "kv_heads": plan.kv_heads or key_heads(name, plan.heads)}
            # beside the width of heads
            own = {"own_width" if k == "width" and mechanisms.own_width(name) else k: x for k, x in options.items()}
            params = {"tokens": tokens, "width": width, **heads, **own}
            blank = Record(NAME, name, passes, dtype, params)
            point, mine = _key(blank)[1:], (name, repr(options))
            if _key(blank) in known:
                beside = (name, *runner.BASELINES)
                kept = (r for key, r in known.items() if key[1:] == point and r.contender in beside)
                found += sorted(kept, key=lambda r: r.contender != name)
                continue
            if mine in lost:
                # what took a process down once would do so at every point
                keep(replace(blank, status="skipped", reason=f"after {lost[mine]}", env=environment(device)))
                continue
            if progress:
                progress(f"{name} {passes} {dtype} n={tokens:,} d={width}")
            work = (name, dtype, passes, str(device), params, against, seconds, max_baseline_seconds)
            try:
                for record in worker.run(measure, *work):
                    keep(record)
            except WorkError as error:
                lost[mine] = str(error)
                keep(replace(blank, status="failed", reason=str(error), env=environment(device)))
    return found


def measure(
    name: str, dtype: str, passes: str, device: str, params: Mapping[str, Any],
    against: Sequence[str] | None, seconds: float, max_baseline_seconds: float,
) -> Iterator[Record]:  # fmt: skip
    """The records of one point: the mechanism's, under its name, and those of its baselines."""
    made = runner.run(
        NAME, device=device, dtypes=[dtype], passes=[passes], against=against, seconds=seconds,
        max_baseline_seconds=max_baseline_seconds, out=None, mechanism=name, **params,
    )  # fmt: skip
    for record in made:
        who, rates = name if record.contender == NAME else record.contender, dict(record.rates)
        if "read" in rates and "sdpa" in record.ratios:
            rates["efficiency"] = record.ratios["sdpa"] * rates["read"]
        yield replace(record, contender=who, params=params, rates=rates)


def _key(record: Record) -> tuple[str, str, str, str]:
    return record.contender, record.passes, record.dtype, repr(sorted(record.params.items()))


def break_even(records: Sequence[Record], baseline: str = "sdpa") -> float | None:
    """The length from which on the mechanism is at least as fast as the baseline, between the lengths measured.

    Args:
        records: one mechanism's, of several lengths; those without a ratio do not count.

    Returns:
        tokens, interpolated on log axes; 0 if it is as fast at the shortest length, inf if it is slower at the
        longest, None if nothing was compared.
    """
    points = sorted((r.tokens, math.log(r.ratios[baseline])) for r in records if r.ratios.get(baseline))
    if not points:
        return None
    if points[-1][1] < 0:
        return math.inf
    slower = [i for i, (_, lead) in enumerate(points) if lead < 0]
    if not slower:
        return 0.0
    (n0, y0), (n1, y1) = points[slower[-1]], points[slower[-1] + 1]
    return n0 * (n1 / n0) ** (-y0 / (y1 - y0))
