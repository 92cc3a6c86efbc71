"""Records as tables: for the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from farfield.bench.records import Record
from farfield.mechanisms import names as mechanism_names

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("dtype", "passes", "n", "time", "10 - 90 %", "extra memory", "baseline", "its time", "its memory", "ratio")


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """One row per point, own work beside its baseline, the ratio last; failures and skips say so."""
    made = []
    for own in records:
        if own.contender != own.bench:
            continue
        base = next(
            (
                r
                for r in records
                if r.contender != r.bench
                and (r.bench, r.dtype, r.passes, r.params) == (own.bench, own.dtype, own.passes, own.params)
                and own.against in (None, r.contender)
            ),
            None,
        )
        spread = f"{seconds(own.times['q10'])} - {seconds(own.times['q90'])}" if own.times else ""
        made.append(
            (
                own.dtype,
                own.passes,
                f"{own.tokens:,}",
                _time(own),
                spread,
                size(own.memory),
                f"{base.contender} {base.backend.removesuffix('_attention')}".strip() if base else "",
                _time(base) if base else "",
                size(base.memory) if base else "",
                times(own.ratio) if own.ratio else "",
            )
        )
    return made


def table(records: Sequence[Record], title: str = "") -> Table:
    """The same for a terminal of 80 columns."""
    from rich.table import Table
    from rich.text import Text

    lines = rows(records)
    # one baseline for all is said once, over its columns
    bases = {row[6] for row in lines if row[6]}
    # without its back-end where it did not run
    bases = {name for name in bases if not any(other.startswith(f"{name} ") for other in bases)}
    base = bases.pop() if len(bases) == 1 else ""
    made = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    made.add_column("dtype")
    made.add_column("passes")
    for heading in ("n", "time", "memory", *(() if base else ("baseline",)), base or "its time", "memory", "ratio"):
        made.add_column(heading, justify="right", no_wrap=True)
    for dtype, passes, n, time, _, memory, name, its_time, its_memory, ratio in lines:
        passes = passes.replace("forward", "fwd").replace("backward", "bwd")
        faster = bool(ratio) and float(ratio.rstrip("x")) >= 1
        last = Text(ratio, style="green" if faster else "yellow")
        made.add_row(dtype, passes, n, time, memory, *(() if base else (name,)), its_time, its_memory, last)
    return made


def plain(records: Sequence[Record]) -> bool:
    """Whether the records are lengths against one baseline, which `table` shows side by side."""
    baselines = {r.contender for r in records if r.contender != r.bench}
    return len(baselines) == 1 and not any(r.rates or r.floor or r.setup for r in records) and not _varied(records)


def points(records: Sequence[Record], title: str = "") -> Table:
    """One line for each contender at each point, with what varies, what was read off, and the ratios to baselines."""
    from rich.table import Table

    varied = _varied(records)
    rates = list(dict.fromkeys(name for r in records for name in r.rates))
    against = list(dict.fromkeys(name for r in records for name in r.ratios))
    built, floors = any(r.setup for r in records), any(r.floor for r in records)
    made = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    headings = ["dtype", "passes", "n", *varied, "", "time", "memory", *rates]
    headings += ["set-up"] * built + ["floor", "share"] * floors + [f"/ {name}" for name in against]
    for at, heading in enumerate(headings):
        made.add_column(heading, justify="left" if at < 2 or not heading else "right", no_wrap=True)
    for r in records:
        passes = r.passes.replace("forward", "fwd").replace("backward", "bwd")
        who = f"{r.contender} {r.backend.removesuffix('_attention')}".strip()
        cells = [r.dtype, passes, f"{r.tokens:,}", *(str(r.params.get(name, "")) for name in varied), who]
        cells += [_time(r), size(r.memory), *(_number(r.rates.get(name)) for name in rates)]
        cells += [seconds(r.setup) if r.setup else ""] * built
        cells += ([seconds(r.floor["seconds"]), f"{r.floor['share']:.0%}"] if r.floor else ["", ""]) * floors
        made.add_row(*cells, *(times(r.ratios[name]) if name in r.ratios else "" for name in against))
    return made


def mechanisms(records: Sequence[Record], title: str = "") -> Table:
    """One line for each mechanism at each point with its baseline; at the last length, where the two are even.

    Args:
        records: each mechanism's followed by those of its baselines.
    """
    from rich.table import Table

    from farfield.bench.mechanisms import break_even

    headings = ("mechanism", "dtype", "passes", "d", "n", "time", "memory", "baseline", "ratio", "rows", "read",
                "efficiency", "even from n")  # fmt: skip
    made = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for at, heading in enumerate(headings):
        made.add_column(heading, justify="left" if at < 3 else "right", no_wrap=True)
    lines: dict[tuple[Any, ...], list[Record]] = {}
    bases: dict[int, Record] = {}
    own: Record | None = None
    for r in records:
        if r.contender in mechanism_names():
            own = r
            shape = (r.dtype, r.passes, *(r.params.get(name) for name in ("width", "heads", "kv_heads")))
            lines.setdefault((label(r), *shape), []).append(r)
        elif own is not None and own.against in (None, r.contender):
            bases[id(own)] = r
    for (who, dtype, passes, width, *_), points in lines.items():
        points.sort(key=lambda r: r.tokens)
        even = break_even(points)
        for at, r in enumerate(points):
            base = bases.get(id(r))
            beside = f"{base.backend.removesuffix('_attention') or base.contender} {_time(base)}" if base else ""
            rows = [r.rates.get(name) for name in ("rows", "read", "efficiency")]
            made.add_row(
                "" if at else who, dtype, passes.replace("forward", "fwd").replace("backward", "bwd"), str(width),
                f"{r.tokens:,}", _time(r), size(r.memory), beside, times(r.ratio) if r.ratio else "",
                _number(rows[0]), "" if rows[1] is None else f"{rows[1]:.2%}", _number(rows[2]),
                even_from(even, points) if at == len(points) - 1 else "",
            )  # fmt: skip
    return made


def even_from(even: float | None, points: Sequence[Record]) -> str:
    """Break-even as it is said: a length, or which end of the measured ones it lies beyond."""
    if even is None:
        return ""
    if even == 0:
        return f"<= {min(r.tokens for r in points if r.ratios):,}"
    return f"> {max(r.tokens for r in points if r.ratios):,}" if math.isinf(even) else f"{even:,.0f}"


def label(record: Record) -> str:
    """The contender and the options that it was given."""
    sizes = ("tokens", "width", "heads", "kv_heads")
    options = [f"{k.removeprefix('own_')}={v}" for k, v in record.params.items() if k not in sizes]
    return f"{record.contender} ({', '.join(options)})" if options else record.contender


def notes(records: Sequence[Record]) -> list[str]:
    """What went wrong or was left out, one line each."""
    return [
        f"{r.contender} {r.passes} {r.dtype} n={r.tokens:,} {r.status}: {r.reason}" for r in records if r.status != "ok"
    ]


def times(ratio: float) -> str:
    """Two decimals, fewer of what is large: 0.005x, 1.25x, 18.3x, 120x."""
    return f"{ratio:.2g}x" if ratio < 0.1 else f"{ratio:.{0 if ratio >= 100 else 1 if ratio >= 10 else 2}f}x"


def seconds(x: float) -> str:
    """Three digits and a unit: 1.23 ms."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if x >= factor or unit == "µs":
            x /= factor
            return f"{x:.{0 if x >= 100 else 1 if x >= 10 else 2}f} {unit}"
    raise AssertionError("unreachable")


def size(x: float | None) -> str:
    """Bytes in binary units: 1.2 MiB."""
    if x is None:
        return ""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if x < 1000:
            break
        x, unit = x / 1024, larger
    return f"{x:.0f} {unit}" if x >= 100 or unit == "B" else f"{x:.1f} {unit}"


def visible(text: str) -> str:
    """Text as a reader may see it: control characters, which could steer a terminal, become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _varied(records: Sequence[Record]) -> list[str]:
    """Options other than the length that differ between points."""
    names = dict.fromkeys(name for r in records for name in r.params if name != "tokens")
    return [name for name in names if len({str(r.params.get(name)) for r in records}) > 1]


def _number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _time(r: Record) -> str:
    return seconds(r.seconds) if r.status == "ok" else r.status
