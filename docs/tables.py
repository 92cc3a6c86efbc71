"""The tables of measured numbers in the README: python docs/tables.py writes them from results/*/fma.jsonl.

Between two comment lines of README.md; a test compares the two. Every cell leads to the record that it comes from.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farfield.bench import records, tables
from farfield.bench.fma import fma
from farfield.bench.records import Record

ROOT = Path(__file__).resolve().parents[1]
START, STOP = "<!-- measured: start, written by docs/tables.py -->", "<!-- measured: stop -->"
PLACEHOLDER = "No record yet: `farfield bench fma --device cpu` measures, `python docs/tables.py` fills the table in."

COLUMNS = tuple((dtype, passes) for dtype in ("float32", "bfloat16") for passes in ("forward", "forward+backward"))


def files(root: Path = ROOT) -> list[Path]:
    """The record files of the README's case, one a machine: GPUs first."""
    return sorted((root / "results").glob("*/fma.jsonl"), key=lambda p: (p.parent.name.startswith("cpu-"), p))


def render(root: Path = ROOT) -> str:
    """What belongs between the two comments."""
    parts = [part for path in files(root) if (part := _machine(path, path.relative_to(root).as_posix()))]
    return "\n\n".join(parts) or PLACEHOLDER


def between(text: str) -> str:
    """What stands between the two comments.

    Raises:
        ValueError: they are not there.
    """
    _, start, rest = text.partition(START)
    body, stop, _ = rest.partition(STOP)
    if not start or not stop:
        raise ValueError(f"no table: the lines {START!r} and {STOP!r} must be there")
    return body.strip()


def put(text: str, table: str) -> str:
    """`text` with `table` between the two comments."""
    return text.replace(f"{START}{text.partition(START)[2].partition(STOP)[0]}{STOP}", f"{START}\n\n{table}\n\n{STOP}")


def _machine(path: Path, link: str) -> str:
    """One machine's table and where it comes from; empty without a point of the case as it stands."""
    lines = [number for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    loaded = records.load(path)
    line_of = {id(record): number for record, number in zip(loaded, lines, strict=True)}
    # points with options of their own are other cases
    shown = [r for r in records.latest(loaded) if set(r.params) == {"tokens"} and (r.dtype, r.passes) in COLUMNS]
    own = {(r.tokens, r.dtype, r.passes): r for r in shown if r.contender == r.bench}
    base = {(r.tokens, r.dtype, r.passes): r for r in shown if r.contender != r.bench}
    if not own:
        return ""
    columns = [c for c in COLUMNS if any(key[1:] == c for key in own)]
    head = ["n", *(_name(*c) for c in columns), f"extra memory, {_name(*columns[-1])}"]
    rows = [head, ["---:"] * len(head)]
    for tokens in sorted({key[0] for key in own}):
        cells = [_cell(own.get((tokens, *c)), base.get((tokens, *c)), line_of, link) for c in columns]
        last = (tokens, *columns[-1])
        rows.append([f"{tokens:,}", *cells, " / ".join(_size(r) for r in (own.get(last), base.get(last)) if r)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{_about([*own.values(), *base.values()], link)}"


def _cell(own: Record | None, base: Record | None, line_of: dict[int, int], link: str) -> str:
    """[ratio](record): time of FMA, time of SDPA; failures and skips say so."""
    if own is None:
        return ""
    theirs = "" if base is None else f" / {_time(base)}"
    name = tables.times(own.ratio) if own.ratio else own.status
    return f"[{name}]({link}#L{line_of[id(own)]}) {_time(own)}{theirs}"


def _name(dtype: str, passes: str) -> str:
    return f"{dtype}, {passes.replace('+', ' + ')}"


def _size(r: Record) -> str:
    return tables.size(None if r.memory is None else float(r.memory)) if r.status == "ok" else r.status


def _time(r: Record) -> str:
    return tables.seconds(r.seconds) if r.status == "ok" else r.status


def _about(shown: Sequence[Record], link: str) -> str:
    """The case, the machine, the versions and the commits, from the records."""
    option = {name: p.default for name, p in inspect.signature(fma).parameters.items()}
    envs = [r.env for r in shown]
    commits = {e["commit"][:10] + (" with local changes" if e.get("dirty") else "") for e in envs if e.get("commit")}
    dates = sorted({e["date"][:10] for e in envs if e.get("date")})
    machines = _said(_machine_name(e["machine"]) for e in envs if e.get("machine"))
    versions = _said(f"PyTorch {e['versions']['torch']}" for e in envs if e.get("versions"))
    threads = _said(f"{e['threads']} threads" for e in envs if e.get("threads") and not e["machine"].get("gpu"))
    commands = _said(f"`{e['command']}`" for e in envs if e.get("command"))
    backends = _said(r.backend.removesuffix("_attention") for r in shown if r.contender != r.bench and r.backend)
    return (
        "Each cell: speed-up over SDPA, time of FMA / time of SDPA; memory likewise"
        + (f" (its {backends} back-end)" if backends else "")
        + f". Causal, one sequence, {option['heads']} heads of width {option['width']}, block {option['block']}, near "
        f"{option['near']}, rank {option['rank']}, mean pooling; making the summaries is included. "
        + "; ".join(
            x for x in (machines, threads, versions, " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]]))) if x
        )
        + f"; commit {', '.join(sorted(commits)) or 'unknown'}; {commands or 'command unknown'}. "
        f"Records: [{link}]({link})."
    )


def _machine_name(machine: Mapping[str, Any]) -> str:
    return machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"


def _said(words) -> str:
    return ", ".join(sorted(set(words)))


def write(root: Path = ROOT) -> Path:
    """Bring the README up to date."""
    path = root / "README.md"
    records.write_atomic(path, put(path.read_text(encoding="utf-8"), render(root)))
    return path


if __name__ == "__main__":
    print(f"{write()}: {json.dumps([str(p.relative_to(ROOT)) for p in files()])}")
