"""The registry: every module in this folder, and in the folders of $FARFIELD_MECHANISMS, is one mechanism.

The file name is the registry name, with hyphens for underscores; nothing else has to be edited to add one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from farfield.mechanism import Mechanism

# Folders of your own mechanisms, as PATH separates them
__path__ += [folder for folder in os.environ.get("FARFIELD_MECHANISMS", "").split(os.pathsep) if folder]


@cache
def names() -> tuple[str, ...]:
    """All registry names, sorted. Imports nothing."""
    found = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(sorted(name.replace("_", "-") for name in found))


@cache
def get(name: str) -> type[Mechanism]:
    """The mechanism class of this registry name.

    Raises:
        ValueError: no such mechanism; the message suggests the nearest names.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"no mechanism {name!r}{hint} All: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    own = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, Mechanism)
        and c.__module__ == module.__name__
        and not c.__name__.startswith("_")
    ]
    if len(own) != 1:
        raise TypeError(f"{module.__file__}: a mechanism file defines one public Mechanism, found {len(own)}")
    return own[0]


def resolve(short: str) -> str:
    """The registry name that `short` stands for: itself, or the only name that starts with it ("s2": "s2-attention").

    Raises:
        ValueError: no name or several start with it; the message names them.
    """
    if short in names():
        return short
    found = [name for name in names() if short and name.startswith(short)]
    if len(found) > 1:
        raise ValueError(f"mechanism {short!r} is not unique: {', '.join(found)}")
    if not found:
        get(short)  # refuses, with suggestions
    return found[0]


def make(name: str, **options) -> Mechanism:
    """The mechanism of this name, built with these options.

    Raises:
        ValueError: no such mechanism, or an option that it does not have or that is of another kind than it asks for;
            the message lists its options, or says which kind.
    """
    check_options(name, options)
    return get(name)(**options)


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise ValueError where the mechanism of this name has no such option."""
    known = inspect.signature(get(name)).parameters
    if unknown := [o for o in options if o not in known]:
        raise ValueError(f"{name}: no option {', '.join(unknown)}; its options are {', '.join(known)}")


def own_width(name: str) -> bool:
    """Whether an option `width` of this mechanism is something else than the width of heads, such as a window's."""
    known = inspect.signature(get(name)).parameters.keys()
    return "width" in known and not known & {"kv_heads", "value_width"}


def make_for(
    name: str,
    options: Mapping[str, Any],
    *,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int | None = None,
) -> Mechanism:
    """`make` for a layer of H query heads, G key heads, widths D and E (default D), whose sizes the constructor is told
    where it asks for them: options `heads`, `kv_heads`, `value_width`, and `width` beside one of the last two (alone it
    means something else, such as a window's). Options given win.
    """
    known = inspect.signature(get(name)).parameters
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": value_width or width}
    if own_width(name):
        del sizes["width"]
    return make(name, **{k: v for k, v in sizes.items() if k in known} | dict(options))
