"""What several commands share: --option NAME=VALUE, lists of numbers, and how examples look in --help."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.markup import escape


def examples(*lines: str) -> str:
    """The epilog of a command's --help."""
    # an empty line between the paragraphs keeps each on a line of its own
    return "\n\n".join(["[bold]Examples[/]", *(f"  [cyan]{escape(line)}[/]" for line in lines)])


def unset(default: object, help: str, *names: str, **options: Any) -> Any:
    """An option that is None unless given; `default` is what --help says instead."""
    return typer.Option(
        *names, show_default=False, help=f"{help} [dim]\\[default: {escape(str(default))}][/]", **options
    )


def parse(pairs: list[str] | None, flag: str = "--option") -> dict[str, Any]:
    """["block=32", "pool=mean", "causal=false"] as keyword arguments: JSON where it is JSON, else text.

    Raises:
        ValueError: an entry is not NAME=VALUE, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"{flag} takes NAME=VALUE, got {pair!r}; for example {flag} block=64")
        if name in found:
            raise ValueError(f"{flag} {name} is given twice")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            # Python's spelling of the three words that JSON spells otherwise
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def numbers(text: str, flag: str) -> list[int]:
    """ "1024,4k" as [1024, 4096].

    Raises:
        ValueError: an entry is no positive whole number.
    """
    found = []
    for entry in text.split(","):
        digits = entry.strip().lower()
        factor = {"k": 1024, "m": 1024**2}.get(digits[-1:], 1)
        digits = digits.rstrip("km") if factor > 1 else digits
        if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
            raise ValueError(f"{flag} takes whole numbers with commas between, such as 1024,4k; got {entry.strip()!r}")
        found.append(int(digits) * factor)
    return found
