"""Figures: time and memory against n, loss curves, the layout picture. Inline SVG that follows the page, or PNG.

Ink is the page's own text colour and the background is the page's, so that one SVG reads well in light and dark. The
series colours keep a contrast of at least 3 to 1 on both, and differ in marker and dash as well as in hue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from farfield.bench import tables
from farfield.bench.records import Record
from farfield.mechanisms import names as mechanism_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# stands for the page's text colour until the SVG is written
INK = "#010203"

# Okabe and Ito's hues, set to lightness that both backgrounds bear
COLORS = {"fma": "#d55e00", "full": "#3a86c8", "sdpa": "#3a86c8", "window": "#1a9a70"}
SPARE = ("#b0609b", "#8a7a1c", "#7a7f87", "#4f6bd8", "#c0504d", "#2f9e9e", "#8064a2", "#5f8f2f")
MARKERS = {"fma": "o", "full": "s", "sdpa": "s", "window": "^"}
DASHES: dict[str, Any] = {"fma": "-", "full": (0, (5, 2)), "sdpa": (0, (5, 2)), "window": (0, (1.5, 1.5))}

STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "farfield",
}


def styled(**options: Any):
    """The house style, as a context."""
    import matplotlib

    return matplotlib.rc_context(cast(Any, {**STYLE, **options}))


def color(name: str, at: int = 0) -> str:
    """The colour of a series: one name looks the same in every figure."""
    return COLORS.get(name, SPARE[at % len(SPARE)])


def look(name: str, at: int = 0) -> dict[str, Any]:
    """Colour, marker and dash of a series."""
    return {
        "color": color(name, at),
        "marker": MARKERS.get(name, "DvpxPh<>*d8"[at % 11]),
        "linestyle": DASHES.get(name, (0, ((4, 1.5, 1, 1.5), (6, 1), (3, 1, 1, 1, 1, 1))[at // len(SPARE) % 3])),
    }


def time_figure(records: Sequence[Record], *, names: Mapping[str, str] | None = None, axis: str = "tokens") -> Figure:
    """Seconds against n, or another option, on log axes; bands are the 10 and 90 % quantiles.

    One panel per passes and dtype, and per value of whatever else differs between the points.
    """
    bands, tick = ("q10", "q90"), _seconds_tick
    return _against(records, axis, "time of one call", lambda r: r.seconds, bands, names or {}, tick, ratios=True)


def memory_figure(records: Sequence[Record], *, names: Mapping[str, str] | None = None, axis: str = "tokens") -> Figure:
    """Peak extra bytes in the same panels."""
    value, tick = (lambda r: float(r.memory or "nan")), _bytes_tick
    return _against(records, axis, "peak extra memory", value, None, names or {}, tick, ratios=False)


def mechanisms_figure(records: Sequence[Record]) -> Figure:
    """Time against n of all mechanisms, a panel for each passes, dtype and head width; the baseline dashed.

    Grouped mechanisms have fewer key heads; the baseline's line is that with as many key as query heads, or the most.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from farfield.bench.tables import label

    timed = [r for r in records if r.times]
    panels = list(dict.fromkeys((r.passes, r.dtype, r.params.get("width")) for r in timed))
    if not panels:
        raise ValueError("plots: no records to draw")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    names = sorted({label(r) for r in timed if r.contender in mechanism_names()})
    beside = sorted({r.contender for r in timed} - set(mechanism_names()))
    backend = {r.contender: r.backend.removesuffix("_attention") for r in timed if r.contender in beside}
    with styled():
        figure = Figure(figsize=(4.4 * columns + 1.6, 3.4 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for ax, (passes, dtype, width) in zip(axes, panels, strict=False):
            here = [r for r in timed if (r.passes, r.dtype, r.params.get("width")) == (passes, dtype, width)]
            for at, name in enumerate([*names, *beside]):
                own = [r for r in here if (r.contender if name in beside else label(r)) == name]
                # the last one of a length wins, here the one with the most key heads
                own.sort(key=lambda r: int(r.params.get("kv_heads") or 0))
                points = {r.tokens: r.seconds for r in own}
                style = look(name.partition(" ")[0], at) | ({"color": INK, "linestyle": "--"} if name in beside else {})
                shown = f"{name}, {backend[name]}" if backend.get(name) else name
                ax.plot(sorted(points), [points[n] for n in sorted(points)], label=shown, **style)
            ax.set(xscale="log", yscale="log", title=f"{passes.replace('+', ' + ')}, {dtype}, d = {width}")
            ax.xaxis.set_major_locator(FixedLocator(sorted({r.tokens for r in timed})))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens_tick(n)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _seconds_tick(y)))
            ax.grid(True)
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax in axes[max(0, len(panels) - columns) : len(panels)]:
            ax.set_xlabel("n, tokens")
        for ax in axes[: len(panels) : columns]:
            ax.set_ylabel("time of one call")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _against(records, axis, label, value, band, names, tick, *, ratios: bool) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    options = dict.fromkeys(name for r in records for name in r.params if name != axis)
    varied = [name for name in options if len({str(r.params.get(name)) for r in records}) > 1]

    def panel(r: Record) -> tuple[Any, ...]:
        return (r.dtype, r.passes, *(r.params.get(name) for name in varied))

    def x_of(r: Record) -> float:
        return float(r.params[axis])

    panels = list(dict.fromkeys(map(panel, records)))
    if not panels:
        raise ValueError("plots: no records to draw")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with styled():
        figure = Figure(figsize=(4.1 * columns, 3.1 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        ticks = sorted({x_of(r) for r in records})
        for ax, shown in zip(axes, panels, strict=False):
            here = [r for r in records if panel(r) == shown]
            title = [shown[1].replace("+", " + "), shown[0]]
            title += [f"{name} {x}" for name, x in zip(varied, shown[2:], strict=True)]
            contenders = list(dict.fromkeys(r.contender for r in here))
            for at, name in enumerate(contenders):
                drawn = (r for r in here if r.contender == name and value(r) == value(r))
                points = sorted(((x_of(r), r) for r in drawn), key=lambda point: point[0])
                if not points:
                    continue
                xs, ys = [n for n, _ in points], [value(r) for _, r in points]
                style = look(name, at)
                if band and all(r.times for _, r in points):
                    low, high = ([r.times[q] for _, r in points] for q in band)
                    ax.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)
                ax.plot(xs, ys, label=names.get(name, name), **style)
                if ratios:
                    _write_ratio(ax, points)
            ax.set(xscale="log", yscale="log", title=", ".join(title))
            ax.xaxis.set_major_locator(FixedLocator(ticks))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens_tick(n)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))
            ax.grid(True)
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax in axes[max(0, len(panels) - columns) : len(panels)]:
            ax.set_xlabel("n, tokens" if axis == "tokens" else axis)
        for ax in axes[: len(panels) : columns]:
            ax.set_ylabel(label)
        axes[0].legend(loc="upper left")
    return figure


def _write_ratio(ax: Axes, points: Sequence[tuple[float, Record]]) -> None:
    """The ratio at the longest length, beside its point."""
    n, last = points[-1]
    if last.ratio:
        ax.annotate(
            tables.times(last.ratio),
            (n, last.seconds),
            textcoords="offset points",
            xytext=(-2, -12),
            ha="right",
            fontsize=9,
        )


def loss_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, points: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """Bits per byte against bytes trained on.

    Args:
        curves: (bytes, bits per byte of the training text) of each model; drawn as running means.
        points: the held-out result of each model at the end.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with styled():
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = figure.subplots()
        styles = looks(curves)
        for name, curve in curves.items():
            style = styles[name]
            smooth = running_mean([y for _, y in curve])
            ax.plot([x for x, _ in curve], smooth, label=name, color=style["color"], linestyle=style["linestyle"])
            if points and name in points:
                ax.plot(*points[name], color=style["color"], marker=style["marker"], markersize=7, linestyle="none")
        lows = [y for curve in curves.values() for _, y in curve]
        if lows:
            # the first steps of a fresh model would squeeze everything else
            ax.set_ylim(top=min(max(lows), 8.2))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count_tick(x)))
        ax.set(xlabel="bytes trained on", ylabel="bits per byte")
        ax.grid(True)
        _legend(figure, ax)
    return figure


def position_figure(curves: Mapping[str, Sequence[tuple[str, float | None, float]]]) -> Figure:
    """Bits per byte by position in the window, on a log axis.

    Args:
        curves: (bucket such as "64-127", bits per byte, share) of each model.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with styled():
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = figure.subplots()
        ends: list[int] = []
        styles = looks(curves)
        for name, rows in curves.items():
            spans = [tuple(map(int, bucket.split("-"))) for bucket, _, _ in rows]
            ends = [last + 1 for _, last in spans]
            # a bucket from 0 has no middle on a log axis
            middles = [((first or last / 2) * last) ** 0.5 for first, last in spans]
            bits = [float("nan") if y is None else y for _, y, _ in rows]
            ax.plot(middles, bits, label=name, **styles[name])
        ax.set(xscale="log", xlabel="position in the window", ylabel="bits per byte")
        ax.xaxis.set_major_locator(FixedLocator(ends))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens_tick(n)))
        ax.grid(True)
        _legend(figure, ax)
    return figure


def repeat_figure(curves: Mapping[str, Sequence[tuple[str, float | None, float]]]) -> Figure:
    """Bits per byte by the distance to the last repeat.

    Args:
        curves: (bucket such as "1-128", bits per byte, share) of each model.
    """
    from matplotlib.figure import Figure

    buckets = list(dict.fromkeys(bucket for rows in curves.values() for bucket, _, share in rows if share))
    with styled():
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = figure.subplots()
        for name, style in looks(curves).items():
            values = {bucket: bits for bucket, bits, _ in curves[name]}
            bits = [float("nan") if (y := values.get(bucket)) is None else y for bucket in buckets]
            ax.plot(range(len(buckets)), bits, label=name, **style)
        ax.set_xticks(range(len(buckets)), buckets)
        ax.set(xlabel="bytes back to where the last 12 bytes stood before", ylabel="bits per byte")
        ax.grid(True)
        _legend(figure, ax)
    return figure


def rows_figure(points: Mapping[str, tuple[float, float]]) -> Figure:
    """Bits per byte against rows read, one point for each model.

    Args:
        points: rows and bits per byte.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    with styled():
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = figure.subplots()
        for name, style in looks(points).items():
            style["linestyle"] = "none"
            ax.plot(*points[name], label=name, **style)
        ax.set(xscale="log", xlabel="rows that a query reads", ylabel="bits per byte")
        ax.xaxis.set_major_locator(LogLocator(2, numticks=16))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens_tick(n)))
        ax.grid(True)
        _legend(figure, ax)
    return figure


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`look` of each label; the first variant of a mechanism looks like it, every further one has a look of its own."""
    seen: set[str] = set()
    found = {}
    for at, name in enumerate(names):
        kind = name.partition(":")[0]
        found[name] = look(name if kind in seen else kind, at)
        seen.add(kind)
    return found


def recall_figure(
    lengths: Mapping[str, Mapping[int, float]], parts: Mapping[int, Mapping[str, Mapping[str, float]]], *,
    by: str, chance: float, trained: int,
) -> Figure:  # fmt: skip
    """Share of answers that are right: by length, and at each length by distance or depth.

    Args:
        lengths: of each model, accuracy by length.
        parts: at each length, of each model, accuracy by bucket: "32-63", "10-20 %".
        by: "distance" or "depth": what the buckets are.
        chance: what guessing gets, as a line.
        trained: the length of training, as a line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    panels = 1 + len(parts)
    columns = min(2, panels)
    lines = -(-panels // columns)
    styles = looks(lengths)
    with styled():
        figure = Figure(figsize=(4.1 * columns + 1.6, 2.9 * lines), layout="constrained")
        first, *others = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
        for name, found in lengths.items():
            first.plot(list(found), list(found.values()), label=name, **styles[name])
        first.axvline(trained, color=INK, linewidth=0.8, alpha=0.5)
        first.set(xscale="log", xlabel="n, tokens; the line is that of training", title="by length")
        first.xaxis.set_major_locator(FixedLocator(sorted({n for found in lengths.values() for n in found})))
        for ax, (n, models) in zip(others, parts.items(), strict=False):
            ends: set[float] = set()
            for name in lengths:
                rows = models.get(name, {})
                spans = [tuple(map(int, bucket.rstrip(" %").split("-"))) for bucket in rows]
                ends |= {low for low, _ in spans}
                middles = [(low * high) ** 0.5 if by == "distance" else (low + high) / 2 for low, high in spans]
                ax.plot(middles, list(rows.values()), **styles[name])
            ax.set(title=f"n = {n:,}, by {by}", xlabel="tokens back to the key" if by == "distance" else "depth, %")
            if by == "distance":
                ax.set(xscale="log")
                ax.xaxis.set_major_locator(FixedLocator(sorted(ends)[1 :: max(1, len(ends) // 6)]))
        for ax in (first, *others[: len(parts)]):
            ax.axhline(chance, color=INK, linewidth=0.8, linestyle=":")
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            ax.set_ylim(-0.03, 1.03)
            ax.grid(True)
            if ax.get_xscale() == "log":
                ax.xaxis.set_minor_locator(NullLocator())
                ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens_tick(n)))
        for ax in others[len(parts) :]:
            ax.remove()
        first.set_ylabel("answers right")
        figure.legend(*first.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _legend(figure: Figure, ax: Axes) -> None:
    """Inside while there is room, beside the axes otherwise; below them where names are long."""
    handles, labels = ax.get_legend_handles_labels()
    if max(map(len, labels), default=0) > 36:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(labels))
        figure.legend(handles, labels, loc="outside lower left")
    elif len(labels) <= 4:
        ax.legend(loc="upper right")
    else:
        figure.legend(handles, labels, loc="outside right upper")


def running_mean(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Mean of the last `share` of the curve, at least one value, at every point."""
    width = max(1, round(share * len(values)))
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def layout_figure(*, tokens: int = 1024, block: int = 64, near: int = 128, rank: int = 4) -> Figure:
    """Who reads what in causal FMA: queries down, tokens across; every box is one row that a query block reads.

    The near field is drawn token block by token block. Each far row covers the tokens whose mean it is.
    """
    import torch
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from farfield.select import multipole

    plan = multipole(tokens=tokens, block=block, near=near, rank=rank, causal=True)
    boxes: dict[int, list[tuple[int, int, int]]] = {0: []}  # level -> (query, first token, tokens)
    for n in range(plan.near.index.shape[2]):
        for m in plan.near.index[0, 0, n, : int(plan.near.count[0, 0, n])].tolist():
            boxes[0].append((n * block, m * block, block))
    # the far layout names groups of a pyramid whose level l has ceil(blocks / 2^(l-1)) of them
    blocks = -(-tokens // block)
    starts = torch.tensor([0, *(-(-blocks // 2**level) for level in range(30))]).cumsum(0)
    for n in range(plan.far.index.shape[2]):
        for m in plan.far.index[0, 0, n, : int(plan.far.count[0, 0, n])].tolist():
            level = int((starts <= m).sum())
            width = block * 2 ** (level - 1)
            for part in range(rank):
                first = (m - int(starts[level - 1])) * width + part * width // rank
                boxes.setdefault(level, []).append((n * block, first, width // rank))
    shades = (COLORS["fma"], "#1a9a70", "#3a86c8", "#b0609b", "#8a7a1c", "#7a7f87")
    with styled():
        figure = Figure(figsize=(5.6, 5.0), layout="constrained")
        ax = figure.subplots()
        for level, rectangles in sorted(boxes.items()):
            corners = []
            for y, x, width in rectangles:
                high = block
                if level == 0 and x == y:
                    # the diagonal block: a query reads no later token
                    corners.append([(x, y), (x, y + high), (x + width, y + high)])
                else:
                    corners.append([(x, y), (x + width, y), (x + width, y + high), (x, y + high)])
            shade = shades[level % len(shades)]
            ax.add_collection(
                PolyCollection(
                    corners, facecolors=shade, edgecolors=INK, linewidths=0.3, alpha=0.85 if level == 0 else 0.6
                )
            )
        handles = [
            Patch(
                facecolor=shades[level % len(shades)],
                alpha=0.85 if level == 0 else 0.6,
                label="near: tokens as they are" if level == 0
                else f"level {level}: {block * 2 ** (level - 1) // rank} tokens a row",
            )
            for level in sorted(boxes)
        ]  # fmt: skip
        ax.legend(handles=handles, loc="upper right")
        ax.set(xlim=(0, tokens), ylim=(tokens, 0), aspect="equal", xlabel="token read", ylabel="query")
        step = max(block, tokens // 4)
        ax.set_xticks(range(0, tokens + 1, step))
        ax.set_yticks(range(0, tokens + 1, step))
    return figure


def svg(figure: Figure, label: str) -> str:
    """The figure as inline SVG for a page: no fixed size, no outside reference, the page's ink and font.

    Args:
        label: what a reader who does not see it is told.
    """
    buffer = StringIO()
    with styled():
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.S)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="([^"]*)"', head)
    # groups carry ids that other figures carry too, and nothing refers to them
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    prefix = f"{re.sub('[^a-z]+', '-', label.lower()).strip('-')[:24]}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = body.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    body = re.sub(r"font: ([^;\"']*?)([\d.]+px)[^;\"]*", r"font: \1\2 system-ui, sans-serif", body)
    body = body.replace(INK, "currentColor")
    size = box.group(1).split() if box else ["0", "0", "1", "1"]
    return (
        f'<svg viewBox="{" ".join(size)}" role="img" aria-label="{escape(label)}" '
        f'style="width:100%;max-width:{float(size[2]) * 1.45:.0f}px;height:auto;stroke-linejoin:round">'
        f"<title>{escape(label)}</title>{body}"
    )


def save(figure: Figure, path: Path | str) -> Path:
    """Write the figure under its suffix's format (.png, .svg, .pdf), ink dark on white."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    with styled():
        figure.savefig(partial, format=path.suffix.lstrip(".") or "png", dpi=200, facecolor="white")
    partial.replace(path)
    return path


def _tokens_tick(n: float) -> str:
    if n >= 1 << 20 and n % (1 << 20) == 0:
        return f"{n / (1 << 20):g}M"
    return f"{n / 1024:g}k" if n >= 1024 and n % 1024 == 0 else f"{n:g}"


def _count_tick(x: float) -> str:
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}"


def _seconds_tick(y: float) -> str:
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if y >= factor * 0.999:
            return f"{y / factor:g} {unit}"
    return f"{y:g} s"


def _bytes_tick(y: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if y >= factor * 0.999:
            return f"{y / factor:g} {unit}"
    return f"{y:g} B"
