"""What a causal mechanism remembers: values that are copied, cropped, reordered, saved and loaded."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FORMAT = 1


class Memory:
    """What holds tensors: states and rings.

    Subclasses are frozen dataclasses whose fields are ints and strings, tensors, None, or tuples and further
    dataclasses of these.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(x.nbytes for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its dotted name."""
        found: dict[str, Tensor] = {}
        _walk(self, "", lambda name, x: found.setdefault(name, x))
        return found

    def replaced(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same with these tensors, by the names of `tensors()`; those that are not named stay.

        Raises:
            ValueError: there is no tensor of a name.
        """
        if unknown := set(tensors) - set(mine := self.tensors()):
            raise ValueError(f"{type(self).__name__}: has no tensors {sorted(unknown)}; there are {', '.join(mine)}")
        return _walk(self, "", lambda name, x: tensors.get(name, x))

    def copy(self) -> Self:
        """The same in memory of its own, pinned where this is."""

        def clone(_: str, x: Tensor) -> Tensor:
            return torch.empty_like(x, pin_memory=True).copy_(x) if x.is_pinned() else x.clone()

        return _walk(self, "", clone)


@dataclass(frozen=True)
class State(Memory):
    """What a causal mechanism remembers of the tokens it has seen. Never changed in place: extend returns a new one.

    The batch comes first in every tensor.
    """

    tokens: int

    def to(self, *args, **kwargs) -> Self:
        """Every tensor moved as by Tensor.to."""
        return _walk(self, "", lambda name, x: x.to(*args, **kwargs))

    def reorder(self, beams: Int[Tensor, " beams"]) -> Self:
        """The state whose sequence i is this state's sequence beams[i]."""
        return _walk(self, "", lambda name, x: x.index_select(0, beams.to(x.device)))

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, under a temporary name first."""
        save(self, path)

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> State:
        """The state that `save` wrote, of whatever mechanism.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no state, or one of another format.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"State.load: no file {path}")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                about = json.loads((file.metadata() or {}).get("farfield", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"State.load: {path} is no safetensors file: {error}") from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"State.load: {path} holds no state of format {FORMAT}; write it with state.save")
        return _rebuild(about["state"], tensors)

    def crop(self, drop: int) -> Self:
        """The state before the last `drop` tokens, as speculative decoding needs after a rejected draft."""
        raise NotImplementedError(f"{type(self).__name__}: crop is not supported; keep the state from before the draft")

    def left(self, drop: int) -> int:
        """How many tokens there are without the last `drop`.

        Raises:
            ValueError: fewer than none, or more than there are.
        """
        if not isinstance(drop, Integral) or not 0 <= drop <= self.tokens:
            raise ValueError(f"{type(self).__name__}: cannot drop {drop!r} of {self.tokens} tokens")
        return self.tokens - drop

    def forgotten(self, drop: int, most: int | None = None) -> ValueError:
        """The error that the tokens which the state before the last `drop` needs are gone; `most` could be dropped."""
        limit = "" if most is None else f", at most {most}"
        return ValueError(
            f"{type(self).__name__}: cannot drop {drop} of {self.tokens} tokens{limit}: what came before is forgotten. "
            f"Build the mechanism with rewind={drop} or more; it counts from where extend stopped, so add what has "
            "been dropped since"
        )


@dataclass(frozen=True)
class Cache(State):
    """All keys [B, G, tokens, D] and values [B, G, tokens, E], in order."""

    k: Tensor
    v: Tensor

    def crop(self, drop: int) -> Self:
        keep = self.left(drop)
        return replace(self, tokens=keep, k=self.k[:, :, :keep], v=self.v[:, :, :keep])


def save(memory: Memory, path: str | Path) -> None:
    """Write it to a safetensors file that State.load reads, under a temporary name first."""
    from safetensors.torch import save_file

    # whole tensors of their own, since a cropped state holds views
    whole = {name: x.clone().contiguous() for name, x in memory.tensors().items()}
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(whole, beside, metadata={"farfield": json.dumps({"format": FORMAT, "state": _describe(memory)})})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class _Room:
    """A buffer with room behind the tokens that views of it hold.

    Args:
        used: tokens that some view holds; what lies behind is nobody's.
    """

    __slots__ = ("buffer", "used")

    def __init__(self, buffer: Tensor, used: int):
        self.buffer, self.used = buffer, used


# beside the tensors, not in them: copies and files of a tensor have no room
_rooms = WeakTensorKeyDictionary()
_taking = threading.Lock()


def appended(x: Tensor, more: Tensor) -> Tensor:
    """`x` [B, G, T, D] with further tokens behind it; x keeps its values, and its memory may be shared.

    One token after another takes time for one token: what is returned has room behind it, half as much as there is, and
    the first to append to it takes that room. Whoever is second, with other tokens behind the same ones, gets a copy.
    With autograd on there is no room, since what was written in place could not be differentiated.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([x, more.to(x.device)], 2)
    begin, stop = x.shape[2], x.shape[2] + more.shape[2]
    with _taking:
        room = _rooms.get(x)
        # what inference mode has made is written in inference mode only
        if room is not None and room.buffer.is_inference() and not torch.is_inference_mode_enabled():
            room = None
        if room is not None and room.used == begin and room.buffer.shape[2] >= stop:
            room.used = stop
        else:
            room = None
    if room is None:
        # a prompt may be all there is
        size = stop + stop // 2 if begin else stop
        buffer = x.new_empty(*x.shape[:2], size, x.shape[3], pin_memory=x.is_pinned())
        buffer[:, :, :begin] = x
        room = _Room(buffer, stop)
    room.buffer[:, :, begin:stop] = more
    found = room.buffer[:, :, :stop]
    with _taking:
        _rooms[found] = room
    return found


def _walk(x: Any, name: str, visit: Callable[[str, Tensor], Any]) -> Any:
    """`x` with every tensor replaced by visit(dotted name, tensor)."""
    if isinstance(x, Tensor):
        return visit(name, x)
    if isinstance(x, tuple):
        inner = [_walk(y, f"{name}.{i}" if name else str(i), visit) for i, y in enumerate(x)]
        return type(x)(*inner) if hasattr(x, "_fields") else tuple(inner)
    if hasattr(x, "__dataclass_fields__"):
        inner = {f.name: _walk(getattr(x, f.name), f"{name}.{f.name}" if name else f.name, visit) for f in fields(x)}
        return replace(x, **inner)
    return x


def _describe(x: Any, name: str = "") -> Any:
    """Everything but the tensors, as JSON."""
    if isinstance(x, Tensor):
        return {"tensor": name}
    if isinstance(x, tuple):
        return {"tuple": [_describe(y, f"{name}.{i}" if name else str(i)) for i, y in enumerate(x)]}
    if is_dataclass(x):
        inner = {f.name: _describe(getattr(x, f.name), f"{name}.{f.name}" if name else f.name) for f in fields(x)}
        return {"class": f"{type(x).__module__}:{type(x).__qualname__}", "fields": inner}
    return {"value": x}


def _rebuild(x: Any, tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in x:
        return tensors[x["tensor"]]
    if "tuple" in x:
        return tuple(_rebuild(y, tensors) for y in x["tuple"])
    if "class" in x:
        module, _, name = x["class"].partition(":")
        # a file may name dataclasses of this package, and nothing else
        kind = getattr(importlib.import_module(module), name, None) if module.startswith("farfield.") else None
        if not (isinstance(kind, type) and is_dataclass(kind)):
            raise ValueError(f"State.load: the file names {x['class']}, which is no state of farfield")
        return kind(**{key: _rebuild(y, tensors) for key, y in x["fields"].items()})
    return x["value"]
