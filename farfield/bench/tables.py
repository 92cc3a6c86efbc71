"""Records as tables: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from farfield.bench.records import Record

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


def _time(r: Record) -> str:
    return seconds(r.seconds) if r.status == "ok" else r.status
