"""Places on a page that a script writes: between two comment lines that name the place and the script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

SPOT = "<!-- {}: {}, written by {} -->"


def put(page: str, tables: Mapping[str, str], script: str) -> str:
    """`page` with the tables in their spots.

    Raises:
        ValueError: a spot is missing.
    """
    for spot, text in tables.items():
        start, stop = SPOT.format(spot, "start", script), SPOT.format(spot, "stop", script)
        head, there, rest = page.partition(start)
        _, ends, tail = rest.partition(stop)
        if not there or not ends:
            raise ValueError(f"no spot for a table: the lines {start!r} and {stop!r} must be there")
        page = f"{head}{start}\n\n{text}\n\n{stop}{tail}"
    return page


def table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    page = "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *body))
    return re.sub(r"(?<=\d)%", " %", page)


def short(tokens: int) -> str:
    """8k, 1M."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k" if tokens >= 1 << 10 else str(tokens)
