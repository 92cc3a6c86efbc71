"""One HTML file that says what a run found: no script, no outside resource, readable in light and dark.

A run folder holds `demo.json` (settings, models, sample, environment) and `speed.jsonl` (benchmark records). Whatever
of it exists is shown, so that a run that was cut still has its report, and a report can be drawn again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from farfield.bench import plots, tables
from farfield.bench.records import Record, latest, load, write_atomic

NAME = "report.html"

CSS = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1d2126; --soft: #5c646e; --line: #d9dcdf; --card: #f1f2ee;
  --accent: #b64f00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e6e8; --soft: #a0a8b0; --line: #343a41;
  --card: #1d2125; --accent: #f0904a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.card { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; }
.text th { width: 12rem; vertical-align: top; }
.best { font-weight: 700; }
figure { margin: 1.25rem 0; }
pre { background: var(--card); border-radius: .6rem; padding: 1rem; overflow-x: auto; font: .85rem/1.5 ui-monospace,
  SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre .given { color: var(--soft); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


def render(folder: Path | str) -> Path:
    """Write report.html from what the run folder holds, without running anything.

    Raises:
        FileNotFoundError: the folder has neither demo.json nor speed.jsonl.
    """
    folder = Path(folder)
    run, speed = read(folder)
    path = folder / NAME
    write_atomic(path, page(run, speed))
    return path


def read(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """demo.json and the last record of every point; empty where a file is missing, but not both."""
    about, records = folder / "demo.json", folder / "speed.jsonl"
    if not about.exists() and not records.exists():
        raise FileNotFoundError(f"{folder}: no run to report: neither demo.json nor speed.jsonl is there")
    run = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    return run, latest(load(records)) if records.exists() else []


def page(run: Mapping[str, Any], speed: Sequence[Record]) -> str:
    """The whole document."""
    env = run.get("env") or (speed[-1].env if speed else {})
    sections = [
        _head(run, speed),
        _layout(run.get("layout")),
        _quality(run),
        _speed(run, speed),
        _sample(run.get("sample")),
        _repeat(run, env),
    ]
    return _document([s for s in sections if s])


def _document(sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>farfield report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def render_comparison(folder: Path | str) -> Path:
    """Write report.html, compare.md and the figures from compare.json, without running anything.

    Raises:
        FileNotFoundError: the folder has no compare.json.
    """
    folder = Path(folder)
    about = folder / "compare.json"
    if not about.exists():
        raise FileNotFoundError(f"{folder}: no comparison to report: compare.json is not there")
    run = json.loads(about.read_text(encoding="utf-8"))
    for name, figure in comparison_figures(run).items():
        plots.save(figure, folder / f"{name}.svg")
    write_atomic(folder / "compare.md", comparison_markdown(run))
    path = folder / NAME
    write_atomic(path, comparison_page(run))
    return path


def comparison_page(run: Mapping[str, Any]) -> str:
    """A comparison as one document."""
    from farfield.bench.compare import merged

    models, trained = merged(run), run.get("trained", {})
    figures = comparison_figures(run)
    what = {"loss": ("Loss curves", "Training text, running mean; the single points are the held-out results."),
            "position": ("Bits by position", "Held-out text, by position in the window."),
            "repeat": ("Bits by repeat", "Held-out text, by how many bytes back the last 12 bytes stood before."),
            "rows": ("Bits by rows read", "Held-out text, against the rows that a query reads.")}  # fmt: skip
    parts = ["<h1>One model, several mechanisms</h1>", f"<p>{escape(_told(run))}</p>"]
    headings, rows = _comparison_rows(run)
    if models:
        lowest = {at: min(float(row[at]) for row in rows if row[at]) for at in (1, 2, 3)}
        body = []
        for row in rows:
            best = [
                ' class="best"' if at in lowest and float(cell) == lowest[at] else "" for at, cell in enumerate(row)
            ]
            cells = (f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(best, row, strict=True))
            body.append(f"<tr>{''.join(cells)}</tr>")
        parts.append(_table(f"After {trained['tokens']:,} tokens each; bits per byte, lower is better", headings, body))
    parts += [f'<p class="soft">{escape(line)}</p>' for line in _comparison_notes(run)]
    for name, figure in figures.items():
        label, caption = what[name]
        parts.append(f"<figure>{plots.svg(figure, label)}<figcaption>{caption}</figcaption></figure>")
    for caption, headings, rows in _comparison_tables(run):
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
        parts.append(_table(caption, headings, [f"<tr>{row}</tr>" for row in cells]))
    parts.append(_repeat(run, run.get("env", {})))
    return _document([part for part in parts if part])


def comparison_markdown(run: Mapping[str, Any]) -> str:
    """The same in a table of Markdown."""
    headings, rows = _comparison_rows(run)
    lines = ["# One model, several mechanisms", "", _told(run), ""]
    if rows:
        lines += [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    for line in _comparison_notes(run):
        lines += [line, ""]
    for caption, headings, rows in _comparison_tables(run):
        lines += [f"{caption}:", "", f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines + provenance(run))


def _comparison_tables(run: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Caption, headings and rows: by repeat distance, the copy probe, other lengths. Only those that there are."""
    from farfield.bench.compare import merged

    models, found = merged(run), []

    def cell(x: float | None, form: str = ".3f") -> str:
        return "" if x is None else format(x, form)

    if models:
        buckets = [(name, share) for name, _, share in next(iter(models.values()))["by_repeat"] if share]
        body = []
        for label, m in models.items():
            values = {name: bits for name, bits, _ in m["by_repeat"]}
            body.append([label, *(cell(values.get(name)) for name, _ in buckets)])
        headings = ["attention", *(f"{name} ({share:.0%})" for name, share in buckets)]
        if buckets:
            found.append((
                "Bits per byte by how many bytes back the last 12 bytes stood before, with the buckets' shares",
                headings, body,
            ))  # fmt: skip
    probed = {label: m["copies"] for label, m in models.items() if m["copies"]}
    if probed:
        kinds = next(iter(probed.values()))
        headings = ["attention", *(f"{p['kind']} {p['length']} at {p['distance']:,}" for p in kinds)]
        body = [[label, *(f"{p['first']:.2f} > {p['second']:.2f}" for p in probes)] for label, probes in probed.items()]
        found.append((
            "Bits per byte of the first > the second copy of a string put twice into held-out text, by the distance "
            "between the two", headings, body,
        ))  # fmt: skip
    at = {label: {x["length"]: x for x in m["lengths"]} for label, m in models.items() if m.get("lengths")}
    lengths = sorted({n for x in at.values() for n in x})
    for caption, key, form in (
        ("Bits per byte of the same held-out text in windows of other lengths", "overall", ".3f"),
        ("The same, second half of each window", "late", ".3f"),
        ("Tokens a second of these forwards", "speed", ",.0f"),
        ("Rows read at these lengths", "rows", ",.0f"),
        ("Bytes that decoding keeps after so many tokens", "state", ",.0f"),
    ):
        if lengths:
            body = [[label, *(cell(x.get(n, {}).get(key), form) for n in lengths)] for label, x in at.items()]
            found.append((caption, ["attention", *(f"{n:,}" for n in lengths)], body))
    return found


def provenance(run: Mapping[str, Any]) -> list[str]:
    """What it takes to repeat a comparison, as lines of Markdown: one paragraph a sitting."""
    lines = [
        f"Model: {', '.join(f'{k} {v}' for k, v in run.get('model', {}).items())}. "
        f"Training: {', '.join(f'{k} {v}' for k, v in run.get('train', {}).items())}.",
        "",
    ]
    for env in (run.get("env", {}), *run.get("resumed", ())):
        versions = ", ".join(f"{k} {v}" for k, v in env.get("versions", {}).items() if v)
        lines += [
            f"`{env.get('command', '')}`, commit {env.get('commit', 'unknown')}, {env.get('date', '')}, "
            f"{_machine(env.get('machine', {}))}; {versions}.",
            "",
        ]
    return lines


def comparison_figures(run: Mapping[str, Any]) -> dict[str, Any]:
    """Loss curves and bits by position of what there is."""
    from farfield.bench.compare import merged

    models = merged(run)
    if not models:
        return {}
    curves = {name: m["curve"] for name, m in models.items() if m["curve"]}
    ends = {name: (curve[-1][0], models[name]["overall"]) for name, curve in curves.items()}
    figures = {"loss": plots.loss_figure(curves, points=ends)} if curves else {}
    figures["position"] = plots.position_figure({name: m["by_position"] for name, m in models.items()})
    if any(m["by_repeat"] for m in models.values()):
        figures["repeat"] = plots.repeat_figure({name: m["by_repeat"] for name, m in models.items()})
    if rows := {name: (m["rows"], m["overall"]) for name, m in models.items() if m["rows"] is not None}:
        figures["rows"] = plots.rows_figure(rows)
    return figures


def _told(run: Mapping[str, Any]) -> str:
    """How the runs were made, in a paragraph."""
    trained, held, text = run.get("trained", {}), run.get("held_out") or {}, run.get("text", {})
    if not trained:
        return "Nothing has been trained yet."
    said = (
        f"The same model was trained with each mechanism on {', '.join(text.get('files', []))} "
        f"({text.get('train_bytes', 0):,} bytes): the same windows in the same order, the same recipe and initial "
        f"weights from the same seed, {trained['tokens']:,} tokens in {trained['steps']:,} steps of "
        f"{trained['batch']} x {trained['length']:,}."
    )
    if held:
        said += f" Scored: {held['bytes']:,} held-out bytes in {held['windows']} windows."
    if minutes := run.get("settings", {}).get("minutes"):
        said += f" So many tokens is what the slowest mechanism was expected to take {minutes:g} minutes for."
    return said


def _comparison_rows(run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    from farfield.bench.compare import columns, merged

    held = run.get("held_out") or {"early": (0, 0), "late": (0, 0)}
    headings = ["attention", "held out, all", f"first {held['early'][1]:,}", f"from {held['late'][0]:,}"]
    models = merged(run)
    shown = columns(models)
    headings += [heading for heading, _, _ in shown]
    several = any(len(m["seeds"]) > 1 for m in models.values())
    rows = []
    for name, m in models.items():
        cells = [name, *(f"{m[key]:.3f}" for key in ("overall", "early", "late"))]
        for _, key, form in shown:
            value = m.get(key)
            cells.append("" if value is None else value if isinstance(value, str) else format(value, form))
        rows.append(cells + [" ".join(f"{x:.3f}" for x in m["seeds"].values())] * several)
    return headings + ["all, by seed"] * several, rows


def _comparison_notes(run: Mapping[str, Any]) -> list[str]:
    """Noise, what the columns mean, what failed."""
    from farfield.bench.compare import merged, spread

    models = merged(run)
    notes = [x for x in [spread(run)] if x]
    if run.get("runs"):
        notes.append(
            "Rows read: rows that enter a query's softmax, on average; none for a scan. Tokens/s: of training steps. "
            "Memory: what the forward and the backward of one step allocate at their peak, gradients included."
        )
    if any("gap" in m for m in models.values()):
        notes.append(
            "Gap closed: the share of the way from the near field alone (of the same width, where there is) to full "
            "attention."
        )
    notes += [f"{x['label']}, seed {x['seed']}, failed: {x['reason']}" for x in run.get("failed", {}).values()]
    return notes + [
        f"{label} at {x['length']:,} tokens failed: {x['failed']}"
        for label, m in models.items()
        for x in m.get("lengths", ())
        if "failed" in x
    ]


def _head(run: Mapping[str, Any], speed: Sequence[Record]) -> str:
    cards = []
    for passes in ("forward", "forward+backward"):
        own = [r for r in speed if r.contender == r.bench and r.passes == passes and r.ratio]
        if own:
            far = max(own, key=lambda r: (r.tokens, r.dtype == "float32"))
            what = f"the speed of {far.against}: {passes.replace('+', ' + ')} of {far.contender}"
            cards.append((tables.times(far.ratio or 0), f"{what} at n = {far.tokens:,}, {far.dtype}"))
    models = {k: m for k, m in (run.get("models") or {}).items() if m.get("overall") is not None}
    if "fma" in models:
        others = ", ".join(f"{name} {m['overall']:.3f}" for name, m in models.items() if name != "fma")
        cards.append((f"{models['fma']['overall']:.3f}", f"bits per held-out byte with fma; {others}"))
    shown = "".join(f'<div class="card"><b>{escape(big)}</b>{escape(small)}</div>' for big, small in cards)
    where = (run.get("env") or (speed[-1].env if speed else {})).get("machine", {})
    date = (run.get("env") or {}).get("date", "")
    place = escape(f"{_machine(where)} {date[:10]}".strip())
    return (
        "<h1>Near tokens exactly, far tokens through summaries</h1>\n"
        "<p>Fast Multipole Attention reads the tokens near a query one by one and everything further away through "
        "ever coarser summaries, under one softmax. This page shows what that costs and what it keeps, measured on "
        f'this machine in one run.</p>\n<p class="soft">{place}</p>\n'
        + (f'<div class="cards">{shown}</div>' if shown else "")
    )


def _layout(options: Mapping[str, Any] | None) -> str:
    if not options:
        return ""
    figure = plots.svg(plots.layout_figure(**options), "Layout of causal Fast Multipole Attention")
    return (
        "<h2>What each query reads</h2>\n<p>Every query block (down) covers every earlier token (across) exactly "
        "once. Each box is one row of keys that it scores: a block of tokens near the diagonal, one summary each "
        f"further away.</p>\n<figure>{figure}<figcaption>n = {options['tokens']:,}, blocks of {options['block']}, near "
        f"width {options['near']}, {options['rank']} summaries a group.</figcaption></figure>"
    )


def _quality(run: Mapping[str, Any]) -> str:
    models = run.get("models") or {}
    if not models:
        return ""
    trained, held = run.get("trained", {}), run.get("held_out", {})
    early, late = held.get("early"), held.get("late")
    parts = ["<h2>A language model on real text</h2>"]
    text = run.get("text", {})
    if trained:
        parts.append(
            f"<p>The same byte-level model was trained once with each attention on the source of Python's standard "
            f"library ({text.get('train_bytes', 0):,} bytes): the same initial weights and data in the same order, "
            f"{trained['bytes']:,} bytes in {trained['steps']:,} steps of {trained['batch']} x {trained['tokens']:,}. "
            f"Held out: {text.get('valid_files', 0)} files of {len(text.get('modules', []))} modules, "
            f"{held.get('bytes', 0):,} bytes of which were scored. A run of minutes ranks nothing for good.</p>"
        )
    curves = {name: m["curve"] for name, m in models.items() if m.get("curve")}
    if curves:
        ends = {
            name: (m["curve"][-1][0], m["overall"])
            for name, m in models.items()
            if m.get("curve") and m.get("overall") is not None
        }
        figure = plots.svg(plots.loss_figure(curves, points=ends), "Loss curves")
        parts.append(
            f"<figure>{figure}<figcaption>Training text, running mean; the single points are the held-out results."
            "</figcaption></figure>"
        )
    headings = [
        "attention",
        "held out, all",
        f"first {early[1]:,}" if early else "early",
        f"{late[0]:,} to {late[1]:,}" if late else "late",
        "parameters",
        "bytes/s in training",
    ]
    columns = [[m.get(key) for m in models.values()] for key in ("overall", "early", "late")]
    lowest = [min((x for x in column if x is not None), default=None) for column in columns]
    body = []
    for name, m in models.items():
        cells = [f"<td>{escape(_title(name, m.get('options')))}</td>"]
        for key, low in zip(("overall", "early", "late"), lowest, strict=True):
            value = m.get(key)
            best = ' class="best"' if value is not None and value == low else ""
            cells.append(f"<td{best}>{'' if value is None else f'{value:.3f}'}</td>")
        cells.append(f"<td>{m['parameters']:,}</td>" if m.get("parameters") else "<td></td>")
        cells.append(f"<td>{m['speed']:,.0f}</td>" if m.get("speed") else "<td></td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    parts.append(_table("Bits per byte, lower is better, by position in the window", headings, body))
    parts.append(_repeats({name: m["by_repeat"] for name, m in models.items() if m.get("by_repeat")}))
    return "\n".join(parts)


def _repeats(found: Mapping[str, Sequence[Sequence[Any]]]) -> str:
    """Bits per byte by the distance to where the last bytes before stood last: what a far field is for."""
    if not found:
        return ""
    buckets = [(name, share) for name, _, share in next(iter(found.values())) if share]
    headings = ["attention", *(f"{name} ({share:.0%})" for name, share in buckets)]
    body = []
    for name, rows in found.items():
        values = {bucket: bits for bucket, bits, _ in rows}
        cells = "".join(f"<td>{'' if (x := values.get(b)) is None else f'{x:.3f}'}</td>" for b, _ in buckets)
        body.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    caption = (
        "Bits per byte by how many bytes back the last 12 bytes stood before, with each bucket's share of the text"
    )
    return _table(caption, headings, body)


def _speed(run: Mapping[str, Any], speed: Sequence[Record]) -> str:
    if not speed:
        return ""
    params = speed[0].params
    shape = ", ".join(f"{k} = {v}" for k, v in params.items() if k != "tokens" and v is not None)
    backends = sorted({f"{r.contender} ({r.backend})" for r in speed if r.contender != r.bench and r.backend})
    own = [r for r in speed if r.contender == r.bench and r.status == "ok"]
    checked = (
        "Every point was compared with the formula in float64 before it was timed. "
        if all(r.check for r in own) and own
        else ""
    )
    parts = [
        "<h2>Time and memory</h2>",
        f"<p>One causal attention call, its summaries included, against {escape(', '.join(backends) or 'nothing')}: "
        f"{escape(shape)}. {checked}The two were timed in turn. Memory is what one call allocates at its peak beyond "
        "its inputs, outputs and gradients included.</p>",
    ]
    if any(r.times for r in speed):
        parts.append(f"<figure>{plots.svg(plots.time_figure(speed), 'Time against length')}</figure>")
    if any(r.memory for r in speed):
        parts.append(f"<figure>{plots.svg(plots.memory_figure(speed), 'Memory against length')}</figure>")
    body = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in tables.rows(speed)]
    parts.append(_table("A ratio above 1 is faster than the baseline", tables.HEADINGS, body))
    if left := tables.notes(speed):
        parts.append(f'<p class="soft">{"<br>".join(map(escape, left))}</p>')
    return "\n".join(parts)


def _sample(sample: Mapping[str, Any] | None) -> str:
    if not sample:
        return ""
    about = (
        f"Written by the fma model, token by token from its state of {tables.size(sample['state_bytes'])} after a "
        f"prompt of held-out text (grey): {sample['new_tokens']:,} bytes at temperature {sample['temperature']:g}, "
        f"{sample['speed']:,.0f} a second."
    )
    given, made = (escape(tables.visible(sample[part])) for part in ("prompt", "text"))
    return f'<h2>A sample</h2>\n<p>{escape(about)}</p>\n<pre><span class="given">{given}</span>{made}</pre>'


def _repeat(run: Mapping[str, Any], env: Mapping[str, Any]) -> str:
    if not env:
        return ""
    commit = str(env.get("commit", "unknown"))
    if env.get("dirty"):
        commit += ", with changes"
    rows = {
        "Command": f"<code>{escape(str(env.get('command', '')))}</code>",
        "Seed": escape(str(run.get("settings", {}).get("seed", "0"))),
        "Commit": f"<code>{escape(commit)}</code>",
        "Date": escape(str(env.get("date", ""))),
        "Machine": escape(_machine(env.get("machine", {}))),
        "Versions": escape(", ".join(f"{k} {v}" for k, v in env.get("versions", {}).items() if v)),
        "Threads": escape(str(env.get("threads", ""))),
        "Load average": escape(_loads(env.get("load"))),
    }
    if model := run.get("model"):
        rows["Model"] = escape(", ".join(f"{k} {v}" for k, v in model.items()))
    if train := run.get("train"):
        rows["Training"] = escape(", ".join(f"{k} {v}" for k, v in train.items()))
    if modules := run.get("text", {}).get("modules"):
        rows["Held-out modules"] = escape(", ".join(modules))
    if seconds := run.get("seconds"):
        rows["Duration"] = escape(", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()))
    body = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows.items() if value)
    return f'<h2>To repeat it</h2>\n<div class="scroll"><table class="text">{body}</table></div>'


def _table(caption: str, headings: Sequence[str], body: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _title(name: str, options: Mapping[str, Any] | None) -> str:
    return f"{name} ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else name


def _machine(about: Mapping[str, Any]) -> str:
    if not about:
        return ""
    parts = [f"{about.get('cpu', '')}, {about.get('cores', '?')} cores".strip(", ")]
    if about.get("gpu"):
        parts.append(f"{about['gpu']}, driver {about.get('driver') or 'unknown'}")
    return "; ".join(parts)


def _loads(load: Any) -> str:
    if not load:
        return ""
    both = load if isinstance(load[0], list) else [load]
    return " before, ".join(" / ".join(f"{x:g}" for x in one) for one in both) + (" after" if len(both) > 1 else "")
