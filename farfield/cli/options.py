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


def parse(pairs: list[str] | None, flag: str = "--option", example: str = "--option block=64") -> dict[str, Any]:
    """["block=32", "pool=mean", "causal=false"] as keyword arguments: JSON where it is JSON, else text.

    Args:
        flag, example: what errors name, and how it is written.

    Raises:
        ValueError: an entry is not NAME=VALUE, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"{flag} takes NAME=VALUE, got {pair!r}; for example {example}")
        if name in found:
            raise ValueError(f"{flag} {name} is given twice")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            # Python's spelling of the three words that JSON spells otherwise
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def chosen(text: str, flag: str) -> list[tuple[str, dict[str, Any]]]:
    """ "fma,nsa:block=32,top=8" as [("fma", {}), ("nsa", {"block": 32, "top": 8})]; names may be cut short.

    Raises:
        ValueError: no such mechanism, several that start so, one twice with the same options, no NAME=VALUE.
    """
    from farfield import mechanisms

    found: list[tuple[str, list[str]]] = []
    for entry in (x.strip() for x in text.split(",")):
        name, colon, first = entry.partition(":")
        if colon or "=" not in entry:
            found.append((mechanisms.resolve(name.strip()), [first] if colon else []))
        elif found and found[-1][1]:
            found[-1][1].append(entry)
        else:
            raise ValueError(f"{flag}: {entry!r} follows no mechanism's options; write NAME:{entry}")
    made = [(name, parse(options, f"{flag} {name}", f"{flag} {name}:block=64")) for name, options in found]
    for at, each in enumerate(made):
        if each in made[:at]:
            raise ValueError(f"{flag}: {each[0]} is given twice")
    return made


def mixed(text: str, flag: str) -> list[tuple[Any, ...]]:
    """As `chosen`, where an entry may name a second mechanism for every fourth layer: "fma:open=4/full" is
    ("fma", {"open": 4}, ("full", {})).

    Raises:
        ValueError: as `chosen`; a third mechanism.
    """
    entries: list[list[str]] = []
    for piece in text.split(","):
        name = piece.partition("=")[0]
        if entries and "=" in piece and ":" not in name:
            entries[-1].append(piece)
        else:
            entries.append([piece])
    found: list[tuple[Any, ...]] = []
    for entry in entries:
        parts = ",".join(entry).split("/")
        if len(parts) > 2:
            raise ValueError(f"{flag}: at most two mechanisms in a model, NAME/NAME; got {'/'.join(parts)!r}")
        both = [chosen(part, flag)[0] for part in parts]
        made = both[0] if len(both) == 1 else (*both[0], both[1])
        if made in found:
            raise ValueError(f"{flag}: {both[0][0]} is given twice")
        found.append(made)
    return found


def number(text: str, flag: str) -> int:
    """ "4k" as 4096.

    Raises:
        ValueError: no positive whole number, or several.
    """
    found = numbers(text, flag)
    if len(found) > 1:
        raise ValueError(f"{flag} takes one number, got {text!r}")
    return found[0]


def numbers(text: str, flag: str) -> list[int]:
    """ "1024,4k" as [1024, 4096].

    Raises:
        ValueError: an entry is no positive whole number.
    """
    found = []
    for entry in text.split(","):
        digits = entry.strip().lower()
        factor = {"k": 1024, "m": 1024**2}.get(digits[-1:], 1)
        digits = digits[:-1] if factor > 1 else digits
        if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
            raise ValueError(f"{flag} takes whole numbers with commas between, such as 1024,4k; got {entry.strip()!r}")
        found.append(int(digits) * factor)
    return found
