"""The layout pictures of the documentation: python docs/pictures.py writes docs/pictures/*.svg.

Drawn from the library's own layouts, token by token: what a picture shows is what `attend` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import farfield as ff
from farfield.select import hashed

HERE = Path(__file__).parent / "pictures"
TOKENS, UNIT, LEFT, TOP = 64, 6, 34, 26

# near, then coarser and coarser
SHADES = ("#d55e00", "#e69f00", "#009e73", "#0072b2", "#7b4fa3")
HIDDEN = "#e3e6ea"
INK = "#24292f"
CUT, NOTHING = -1, -2  # named by a list but hidden by a rule, not named


class Box(NamedTuple):
    """Queries first .. last - 1 read one row, which stands for the tokens start .. stop - 1."""

    shade: int  # the row's level, or CUT
    first: int
    last: int
    start: int
    stop: int


class Picture(NamedTuple):
    """Boxes on a grid of TOKENS queries and tokens, and what the shades mean."""

    title: str
    boxes: tuple[Box, ...]
    legend: tuple[tuple[int, str], ...]


def multipole(*, block: int = 4, near: int = 8, rank: int = 2) -> Picture:
    """Near and far lists of causal FMA. Fails unless each (query, token) pair is covered exactly once."""
    sizes = {"tokens": TOKENS, "block": block, "near": near, "rank": rank}
    plan = ff.select.multipole(**sizes)
    nothing = torch.zeros(1, 1, TOKENS, 1)
    offsets = ff.summarize(ff.Rows(nothing, nothing), block=block, rank=rank).offsets
    level = torch.where(ff.select.to_dense(plan.near)[0, 0], 0, NOTHING)
    row = torch.arange(TOKENS).repeat(TOKENS, 1)
    for n in range(TOKENS // block):
        queries = slice(n * block, (n + 1) * block)
        for group in plan.far.index[0, 0, n, : int(plan.far.count[0, 0, n])].tolist():
            height = max(h for h, offset in enumerate(offsets) if offset <= group * rank)
            width = block << height
            start = (group - offsets[height] // rank) * width
            if (level[queries, start : start + width] >= 0).any():
                raise AssertionError(f"query block {n} reads tokens from {start} on twice")
            level[queries, start : start + width] = height + 1
            row[queries, start : start + width] = start + torch.arange(width) // (width // rank) * (width // rank)
    if not (level.tril() >= 0).all():
        raise AssertionError("a query leaves tokens out")
    legend = [(0, "tokens, one by one")]
    legend += [(h + 1, f"level {h + 1}: {(block << h) // rank} tokens a row") for h in range(int(level.max()))]
    return Picture(f"multipole: block {block}, near {near}, rank {rank}", boxes(level, row), tuple(legend))


def window(*, width: int = 12, sinks: int = 2, block: int = 8) -> Picture:
    """A window with sinks: the lists name blocks, `reach` and causality trim them to the token."""
    layout = ff.select.window(tokens=TOKENS, width=width, sinks=sinks, block=block)
    legend = ((0, "read"), (CUT, "in a block on the list, but hidden"))
    return Picture(f"window: width {width}, sinks {sinks}, block {block}", _blocks(layout), legend)


def strided(*, stride: int = 4, local: int = 2, block: int = 4) -> Picture:
    """Blocks close by, and every `stride`-th block before."""
    layout = ff.select.strided(tokens=TOKENS, stride=stride, local=local, block=block)
    legend = ((0, "read"), (CUT, "in a block on the list, but hidden"))
    return Picture(f"strided: stride {stride}, local {local}, block {block}", _blocks(layout), legend)


def sharded(*, heads: int = 4, local: int = 2, block: int = 4) -> Picture:
    """Blocks close by, which all heads read, and those far away, each of which one head reads."""
    layout = ff.select.sharded(tokens=TOKENS, heads=heads, stride=heads, local=local, block=block)
    read = ff.select.to_dense(layout)[0]
    if not (read.sum(0)[torch.ones(TOKENS, TOKENS).tril().bool()].unique() == torch.tensor([1, heads])).all():
        raise AssertionError("a token is read neither by one head nor by all")
    level = torch.where(read.any(0), read.int().argmax(0) + 1, NOTHING).masked_fill(read.all(0), 0)
    named = ff.select.to_dense(replace(layout, causal=False))[0]
    level = level.masked_fill(named.any(0) & ~read.any(0), CUT)
    legend = [(0, "all heads"), *((g + 1, f"head {g}") for g in range(heads)), (CUT, "hidden")]
    title = f"sharded: heads {heads}, stride {heads}, local {local}, block {block}"
    return Picture(title, boxes(level, torch.arange(TOKENS).repeat(TOKENS, 1)), tuple(legend))


def powers(*, window: int = 2, sinks: int = 1, block: int = 2) -> Picture:
    """Blocks at distances 1, 2, 4, 8, ..., a window and sinks."""
    layout = ff.select.powers(tokens=TOKENS, block=block, window=window, sinks=sinks)
    legend = ((0, "read"), (CUT, "in a block on the list, but hidden"))
    return Picture(f"powers: window {window}, sinks {sinks}, block {block}", _blocks(layout), legend)


def sorted_slots(*, block: int = 4) -> Picture:
    """Tokens sorted by (bucket, position): a block of queries reads a run of blocks of its bucket."""
    sizes = torch.tensor([16, 8, 28, 12])
    bucket = torch.arange(4).repeat_interleave(sizes)[
        torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    ]
    bucket = bucket.expand(1, 1, -1)
    order = hashed.sort(bucket, many=4, queries=bucket, block=block)
    named = ff.select.to_dense(replace(order.layout, causal=False))[0, 0, :TOKENS, :TOKENS]
    read = named & (torch.arange(TOKENS) <= order.slots.position[0, 0, :TOKENS, None])
    if read.sum() != (sizes * (sizes - 1) // 2).sum():
        raise AssertionError("a token does not read what is before it in its bucket, and nothing else")
    own = bucket[0, 0, order.slots.q_token[0, 0, :TOKENS].long()]
    level = torch.where(read, own[:, None] + 1, torch.where(named, CUT, NOTHING))
    legend = [*((b + 1, f"bucket {b}") for b in range(4)), (CUT, "in a block on the list, but hidden")]
    return Picture(f"sorted: block {block}", boxes(level, torch.arange(TOKENS).repeat(TOKENS, 1)), tuple(legend))


PICTURES = {
    "multipole": multipole,
    "window": window,
    "strided": strided,
    "sharded": sharded,
    "powers": powers,
    "sorted": sorted_slots,
}


def boxes(level: Tensor, row: Tensor) -> tuple[Box, ...]:
    """What cells of one row and level make together, queries that read the same rows in one box."""
    found, open_ = [], {}
    for i in range(TOKENS + 1):
        runs = _runs(level[i].tolist(), row[i].tolist()) if i < TOKENS else set()
        for run in [run for run in open_ if run not in runs]:
            shade, start, stop = run
            found.append(Box(shade, open_.pop(run), i, start, stop))
        for run in runs:
            open_.setdefault(run, i)
    return tuple(sorted(b for b in found if b.shade != NOTHING))


def svg(picture: Picture) -> str:
    """The picture as text that depends on nothing but the picture."""
    side = TOKENS * UNIT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + side + 12} {TOP + side + 14}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="{INK}">',
        f"<title>{picture.title}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for shade in sorted({b.shade for b in picture.boxes}):
        paths = "".join(
            f"M{LEFT + b.start * UNIT} {TOP + b.first * UNIT}h{(b.stop - b.start) * UNIT}"
            f"v{(b.last - b.first) * UNIT}h{(b.start - b.stop) * UNIT}z"
            for b in picture.boxes
            if b.shade == shade
        )
        lines.append(f'<path fill="{_shade(shade)}" stroke="#ffffff" stroke-width="0.8" d="{paths}"/>')
    lines.append(f'<rect x="{LEFT}" y="{TOP}" width="{side}" height="{side}" fill="none" stroke="{INK}"/>')
    for at in range(0, TOKENS + 1, 16):
        lines.append(f'<text x="{LEFT + at * UNIT}" y="{TOP - 6}" text-anchor="middle">{at}</text>')
        lines.append(f'<text x="{LEFT - 5}" y="{TOP + at * UNIT + 4}" text-anchor="end">{at}</text>')
    lines.append(f'<text x="{LEFT + 40 * UNIT}" y="{TOP - 6}" text-anchor="middle">token</text>')
    lines.append(
        f'<text x="12" y="{TOP + 40 * UNIT}" text-anchor="middle" '
        f'transform="rotate(-90 12 {TOP + 40 * UNIT})">query</text>'
    )
    # causal layouts leave the upper right corner free
    for n, (shade, words) in enumerate(picture.legend):
        x, y = LEFT + side // 2 - 20, TOP + 18 + 18 * n
        lines.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{_shade(shade)}"/>')
        lines.append(f'<text x="{x + 16}" y="{y}">{words}</text>')
    return "\n".join([*lines, "</svg>", ""])


def write(folder: Path = HERE) -> Sequence[Path]:
    """Draw all pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg" for name in PICTURES]
    for path in paths:
        path.write_text(svg(PICTURES[path.stem]()), encoding="utf-8")
    return paths


def _blocks(layout: ff.Layout) -> tuple[Box, ...]:
    """A layout over tokens: cells that are read one by one, what only the lists name a block at a time."""
    seen = ff.select.to_dense(layout)[0, 0]
    level = torch.full_like(seen, NOTHING, dtype=torch.long)
    for n in range(layout.index.shape[2]):
        for m in layout.index[0, 0, n, : int(layout.count[0, 0, n])].tolist():
            level[n * layout.q_block : (n + 1) * layout.q_block, m * layout.k_block : (m + 1) * layout.k_block] = CUT
    return boxes(torch.where(seen, 0, level), torch.arange(TOKENS).repeat(TOKENS, 1))


def _runs(level: list[int], row: list[int]) -> set[tuple[int, int, int]]:
    """(level, start, stop) of the neighbours that belong to one row."""
    edges = [j for j in range(1, TOKENS) if (level[j], row[j]) != (level[j - 1], row[j - 1])]
    return {(level[a], a, b) for a, b in zip([0, *edges], [*edges, TOKENS], strict=True)}


def _shade(level: int) -> str:
    return HIDDEN if level < 0 else SHADES[level % len(SHADES)]


if __name__ == "__main__":
    for path in write():
        print(path)
