"""What every attention mechanism is: a module on (q, k, v) that says what it supports and refuses the rest in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from farfield.state import State

if TYPE_CHECKING:
    from farfield.token_ring import Ring

Rotary = Callable[[Tensor, Tensor], Tensor]
"""`rotary(x, position)`: rotate x [B, H, T, D] to the positions [T] or [B, T], which may be fractional."""


# fields of a state that its mechanism has as options
SIZES = ("block", "near", "rank", "width", "sinks", "k_block")


@dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from."""

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class Case:
    """One configuration under which the contract tests, the benchmark and the docs run a mechanism.

    Args:
        options: keyword arguments of the mechanism's constructor.
        tokens: sequence length, small.
        block: length at which something changes: 1, block - 1, block and block + 1 tokens are tested as well.
        heads, kv_heads, width, value_width: shape of q, k, v.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 96
    block: int = 16
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16

    def __str__(self) -> str:
        return "-".join(f"{k}={v}" for k, v in self.options.items()) or "default"


@dataclass(frozen=True)
class Supports:
    """What a mechanism can do. Whatever is False here is refused with a reason when it is asked for."""

    causal: bool = True
    noncausal: bool = True
    cross: bool = False  # k and v of another length than q
    training: bool = True
    decode: bool = True  # extend: prefill in any chunking, then token by token
    grouped: bool = True  # fewer key/value heads than query heads
    heads_apart: bool = True  # the query heads of one key head know nothing of each other
    packed: bool = False  # padding and several documents a row, by `group`
    value_width: bool = True  # E != D
    rotary: bool = False  # takes `rotary` and places it itself; otherwise q and k come rotated
    relative: bool = True  # with `rotary`, a shift of all positions changes nothing
    dims: tuple[int, ...] = (1,)


PLAIN = {
    "int": ("a whole number", Integral),
    "float": ("a number", Real),
    "bool": ("true or false", bool),
    "str": ("text", str),
    "None": ("None", type(None)),
}
"""What annotations of plain values ask for."""


def check_plain(who: str, name: str, annotation: Any, value: Any) -> None:
    """Raise ValueError where a plain value is not of the annotated kind; others are not looked at."""
    kinds = (annotation.__name__ if isinstance(annotation, type) else str(annotation)).split(" | ")
    if not PLAIN.keys() >= set(kinds):
        return
    # True is no number here, and nothing is compared with NaN
    wrong = not isinstance(value, tuple(PLAIN[kind][1] for kind in kinds)) or value != value
    if wrong or (isinstance(value, bool) and "bool" not in kinds):
        raise ValueError(f"{who}: {name} must be {' or '.join(PLAIN[kind][0] for kind in kinds)}, got {value!r}")


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that looks at the kinds of its options first."""
    known = inspect.signature(init).parameters

    @wraps(init)
    def checked(self, *args, **options):
        for option, value in options.items():
            if option in known:
                check_plain(self.name, option, known[option].annotation, value)
        init(self, *args, **options)

    return checked


class Mechanism(nn.Module):
    """An attention operator on q [B, H, T, D], k [B, G, T, D], v [B, G, T, E].

    Subclasses set `paper`, `cases` and `supports`, take keyword-only options with the paper's defaults, and implement
    `forward`, `reference` and, where `supports.decode`, `extend`, whose states are of the class `remembers`. Some have
    a `ring`, of a class that `decodes` names. An option that is not of the kind its annotation says is refused before
    a constructor sees it, where that is a plain one.
    """

    paper: ClassVar[Paper]
    remembers: ClassVar[type[State] | tuple[type[State], ...]] = State
    decodes: ClassVar[tuple[type, ...]] = (object,)  # what `step` takes: its rings
    cases: ClassVar[tuple[Case, ...]]
    grouped: ClassVar[bool] = False  # the paper shares key heads among query heads; benchmarks then do as well
    supports: Supports = Supports()  # an instance whose options forbid something narrows it

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _checked(cls.__init__)

    @_checked
    def __init__(self, *, causal: bool = True, scale: float | None = None):
        super().__init__()
        allowed = self.supports.causal if causal else self.supports.noncausal
        if not allowed:
            raise NotImplementedError(f"{self.name}: causal={causal} is not supported by this mechanism")
        self.causal, self.scale = causal, scale

    @property
    def name(self) -> str:
        """The registry name: the name of the file, with hyphens."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def forward(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S E"],
        *,
        group: Int[Tensor, "#B T"] | None = None,
        rotary: Rotary | None = None,
    ) -> Float[Tensor, "B H T E"]:
        """Attention of every query.

        Args:
            group: document of each token, for packed or padded batches: tokens see their own document only, negative
                ids are padding, which nobody sees and whose output is 0. A document is a run of equal ids.
            rotary: rotates queries and keys, for mechanisms with `supports.rotary`; the others take rotated q and k.
        """
        raise NotImplementedError

    def extend(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G T D"],
        v: Float[Tensor, "B G T E"],
        state: State | None = None,
        *,
        rotary: Rotary | None = None,
    ) -> tuple[Float[Tensor, "B H T E"], State]:
        """Attention of T further tokens after those in `state`: prefill in any chunking, then one token at a time.

        The outputs are those of one forward over everything. `state` stays valid and unchanged.
        """
        raise NotImplementedError(f"{self.name}: no decode state; call forward on the whole sequence")

    def ring(self, state: Any, *, capacity: int, rotary: Rotary | None = None) -> Ring:
        """Buffers of fixed size that go on where a state of `extend` stands, for sequences of up to `capacity` tokens.

        Args:
            rotary: as `extend` had it.

        Raises:
            ValueError: the state has more tokens than `capacity`.
            NotImplementedError: the mechanism, or its options, have no such buffers; `extend` decodes.
        """
        raise NotImplementedError(f"{self.name}: no buffers of fixed size to decode from; decode with extend")

    def step(
        self, q: Float[Tensor, "B H 1 D"], k: Float[Tensor, "B G 1 D"], v: Float[Tensor, "B G 1 E"], ring: Any
    ) -> Float[Tensor, "B H 1 E"]:
        """`extend` by one token a sequence, in place and without gradients: what a CUDA graph captures.

        Raises:
            TypeError: a ring of another mechanism.
            ValueError: a ring that was made with other options.
        """
        self.check_step(ring)
        return ring.step(q, k, v, scale=self.scale)

    def auxiliary(self, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None) -> Float[Tensor, ""] | None:
        """What weights of the mechanism minimize that the output has no gradient for, such as those of a score that
        selects; None where there are none. Arguments as the forward's; no gradient for them."""
        return None

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The paper's formula, literally: dense, slow, float64 in the tests, sharing nothing with forward."""
        raise NotImplementedError

    def rows_read(self, tokens: int) -> float | None:
        """Rows that enter a query's softmax, on average over the queries and heads of a forward over `tokens` tokens.

        A token and a summary count as one row each, and only where the query sees them; rows that are merely scored,
        so that others can be chosen, do not count. By default the sum over `layouts(tokens)`, where there are any.

        Returns:
            None where no rows are read one by one (a scan), or where their number depends on the data.
        """
        layouts = getattr(self, "layouts", None)
        return None if layouts is None else sum(layout.visible for layout in layouts(tokens).values())

    def check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        group: Tensor | None = None,
        rotary: Rotary | None = None,
        state: State | None = None,
    ):
        """Refuse what the mechanism or the shapes cannot honour.

        Raises:
            ValueError: shapes, devices or a state do not fit together.
            TypeError: dtypes do not fit together, or the state is another mechanism's.
            NotImplementedError: the mechanism does not support what is asked for.
        """
        who = self.name
        check_qkv(who, q, k, v)
        if not self.supports.cross and q.shape[2] != k.shape[2]:
            raise NotImplementedError(
                f"{who}: self-attention only, but q has {q.shape[2]} tokens and k {k.shape[2]}; "
                "tensors are [batch, heads, tokens, width]"
            )
        if not self.supports.grouped and q.shape[1] != k.shape[1]:
            raise NotImplementedError(
                f"{who}: needs as many key heads as query heads, got H={q.shape[1]} and G={k.shape[1]}; "
                "repeat k and v along the heads"
            )
        if not self.supports.value_width and v.shape[3] != k.shape[3]:
            raise NotImplementedError(f"{who}: needs E = D, got E={v.shape[3]} and D={k.shape[3]}")
        if group is not None:
            if not self.supports.packed:
                raise NotImplementedError(f"{who}: cannot pack documents or mask padding; run sequences one by one")
            if not isinstance(group, Tensor):
                raise TypeError(f"{who}: group must be a tensor of document ids, got {type(group).__name__}")
            if group.shape[-1] != q.shape[2] or group.dim() != 2 or group.shape[0] not in (1, q.shape[0]):
                raise ValueError(f"{who}: group must be [B, T] = [{q.shape[0]}, {q.shape[2]}], got {list(group.shape)}")
            if group.is_floating_point() or group.dtype == torch.bool:
                raise TypeError(f"{who}: group holds integer document ids, got {group.dtype}")
        self.check_rotary(rotary)
        if state is not None:
            self.check_state(state, k)

    def check_rotary(self, rotary: Rotary | None) -> None:
        """Refuse a rotation that the mechanism does not place."""
        if rotary is not None and not self.supports.rotary:
            raise NotImplementedError(f"{self.name}: does not place rotations itself; rotate q and k before the call")
        if rotary is not None and not callable(rotary):
            raise TypeError(f"{self.name}: rotary must be a function of x and position, got {type(rotary).__name__}")

    def check_ring(self, state: State, rotary: Rotary | None) -> None:
        """Refuse what no ring goes on from: a rotation that the mechanism does not place, a state of another one."""
        self.check_rotary(rotary)
        self._check_kind(state)

    def _check_kind(self, state: State) -> None:
        own = self.remembers
        if not isinstance(state, own):
            names = " or ".join(x.__name__ for x in (own if isinstance(own, tuple) else (own,)))
            raise TypeError(f"{self.name}: goes on from a state of its own, {names}, got {type(state).__name__}")

    def check_step(self, ring: Any) -> None:
        """Refuse a ring of another mechanism, or of other options."""
        if not isinstance(ring, self.decodes):
            raise TypeError(f"{self.name}: steps a ring of its own, made by ring(), got {type(ring).__name__}")
        mine = self.ring_sizes()
        theirs = {size: getattr(ring, size, None) for size in mine}
        if theirs != mine:
            raise ValueError(f"{self.name}: the ring was made for {theirs}, not for {mine}; make it by ring()")

    def ring_sizes(self) -> dict[str, Any]:
        """What a ring of this mechanism has for certain, by the names of its attributes."""
        return {}

    def check_state(self, state: State, k: Tensor) -> None:
        """Refuse a state of another mechanism, of other options, or of another batch."""
        self._check_kind(state)
        who = self.name
        for name in SIZES:
            there = getattr(state, name, None)
            if there is not None and there != getattr(self, name, there):
                raise ValueError(
                    f"{who}: the state was made with {name}={there}, not {name}={getattr(self, name)}; begin a new one"
                )
        # the batch comes first in every tensor
        sequences = next((len(x) for x in vars(state).values() if isinstance(x, Tensor)), len(k))
        if sequences != len(k):
            raise ValueError(f"{who}: the state holds {sequences} sequences, got {len(k)} (state.reorder picks some)")
        held = getattr(state, "k", None)
        if held is None:
            return
        if (*held.shape[:2], held.shape[3]) != (*k.shape[:2], k.shape[3]):
            raise ValueError(
                f"{who}: the state holds keys {list(held.shape)}, k is {list(k.shape)}; batch, heads and width must "
                "agree (state.reorder picks sequences)"
            )
        if held.dtype != k.dtype:
            raise TypeError(f"{who}: the state holds {held.dtype}, got {k.dtype}; use one dtype, or state.to")
        if held.device != k.device:
            raise ValueError(f"{who}: the state is on {held.device}, k on {k.device}; use state.to({str(k.device)!r})")


def no_tokens(q: Float[Tensor, "B H 0 D"], v: Float[Tensor, "B G 0 E"]) -> Float[Tensor, "B H 0 E"]:
    """The output for no tokens, still part of the graph."""
    return q.sum(-1, keepdim=True) * v.new_zeros(v.shape[3])


def check_qkv(who: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError or TypeError unless q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] fit together."""
    _check_alike(who, {"q": q, "k": k, "v": v})
    _check_rows(who, k, v)
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{who}: q has width {q.shape[3]}, k has {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{who}: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")


def check_kv(who: str, k: Tensor, v: Tensor) -> None:
    """Raise ValueError or TypeError unless k [B, G, S, D] and v [B, G, S, E] fit together."""
    _check_alike(who, {"k": k, "v": v})
    _check_rows(who, k, v)


def _check_rows(who: str, k: Tensor, v: Tensor) -> None:
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"{who}: k and v must agree in heads and rows, got k {list(k.shape)} and v {list(v.shape)}")


def _check_alike(who: str, given: dict[str, Tensor]) -> None:
    """Four dimensions, floating point, and the first one's dtype, device and batch."""
    (first, one), *_ = given.items()
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{who}: {name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{who}: {name} must be [batch, heads, tokens, width], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{who}: {name} must be floating point, got {x.dtype}")
        if x.dtype != one.dtype:
            raise TypeError(
                f"{who}: {_listed(given)} must share a dtype, got {one.dtype} for {first} and {x.dtype} for {name}"
            )
        if x.device != one.device:
            raise ValueError(
                f"{who}: {_listed(given)} must share a device, got {one.device} for {first} and {x.device} for {name}"
            )
        if x.shape[0] != one.shape[0]:
            raise ValueError(f"{who}: {first} has batch {one.shape[0]}, {name} has {x.shape[0]}")


def _listed(names: Iterable[str]) -> str:
    """ "q, k and v"."""
    *some, last = names
    return f"{', '.join(some)} and {last}"
