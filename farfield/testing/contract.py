"""The contract of every mechanism, as plain functions: `check(kind, case)` returns, or raises AssertionError.

`kind` is a registry name or a Mechanism subclass, `case` one of its cases. Numbers are compared with the mechanism's
own `reference`, computed in float64 on inputs that every dtype holds exactly. A check is left out only where the
mechanism declares that it does not support what the check asks for:

    for check in contract.CHECKS:
        if not contract.why_not(check, "fma", case):
            check("fma", case)

Inside `with inputs.on("cuda")` what is tested and what it is compared with run there, else on the CPU.
"""

from __future__ import annotations

import copy
import inspect
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from farfield import mechanisms
from farfield.mechanism import Case, Mechanism, State
from farfield.testing.inputs import device, draw, normal
from farfield.testing.units import assert_within

Kind = str | type[Mechanism]
Check = Callable[[Kind, Case], None]

CHECKS: list[Check] = []


def cases(names: tuple[str, ...] | None = None) -> list[tuple[str, Case]]:
    """(name, case) of every registered mechanism, or of these."""
    return [(name, case) for name in names or mechanisms.names() for case in mechanisms.get(name).cases]


def why_not(check: Check, kind: Kind, case: Case) -> str | None:
    """Which declared lack makes this check meaningless for the mechanism; None if it must pass."""
    mech = _class(kind)(**case.options)
    # options may take away what the class supports
    supports, lacks = mech.supports, {"is causal": not mech.causal, "is noncausal": mech.causal}
    for need in check.needs:  # type: ignore[attr-defined]
        if lacks.get(need):
            return f"the case {need.replace('is', 'is not', 1)}"
        if need not in lacks and not getattr(supports, need):
            return f"supports.{need} is False"
    return None


def _contract(*needs: str) -> Callable[[Check], Check]:
    """Put a check on the list. `needs` are fields of Supports, or "is causal", "is noncausal": what the case is."""

    def enlist(check: Check) -> Check:
        check.needs = needs  # type: ignore[attr-defined]
        CHECKS.append(check)
        return check

    return enlist


# what it says of itself


@_contract()
def check_declares_itself(kind: Kind, case: Case) -> None:
    """Name, paper and cases are there, and the case's options are those of the constructor."""
    cls = _class(kind)
    assert all((cls.paper.title, cls.paper.authors, 1900 < cls.paper.year < 2100)), f"{cls.__name__}: incomplete paper"
    assert case in cls.cases, f"{cls.__name__}: {case} is not among its cases"
    assert (cls.__module__.rpartition(".")[2].replace("_", "-")) == build(kind, case).name
    assert cls.__doc__ or sys.modules[cls.__module__].__doc__, f"{cls.__name__}: no docstring"
    assert case.heads % case.kv_heads == 0, f"{case}: kv_heads must divide heads"


@_contract()
def check_refuses_what_it_does_not_support(kind: Kind, case: Case) -> None:
    """Everything declared unsupported raises NotImplementedError with words in it."""
    cls, mech = _class(kind), build(kind, case)
    supports = mech.supports
    q, k, v = draw(case, torch.float32)
    if not supports.causal:
        _refused(lambda: cls(**{**case.options, "causal": True}))
    if not supports.noncausal:
        _refused(lambda: cls(**{**case.options, "causal": False}))
    if not supports.cross and case.tokens > 1:
        _refused(lambda: mech(q, k[:, :, 1:], v[:, :, 1:]))
    if not supports.grouped:
        _refused(lambda: mech(torch.cat([q, q], 1), k, v))
    if not supports.value_width:
        _refused(lambda: mech(q, k, torch.cat([v, v], -1)))
    if not supports.packed:
        _refused(lambda: mech(q, k, v, group=torch.zeros(2, case.tokens, dtype=torch.int64, device=device())))
    if not supports.rotary:
        _refused(lambda: mech(q, k, v, rotary=lambda x, position: x))
    if not supports.training:
        _refused(lambda: mech(q, k, v))
    # one noncausal forward is not what any order of extends can give
    if not supports.decode or not mech.causal:
        _refused(lambda: mech.extend(q, k, v))


@_contract()
def check_refuses_wrong_inputs(kind: Kind, case: Case) -> None:
    """Shapes and dtypes that do not fit are ValueError or TypeError, never a wrong result or a crash inside."""
    mech = build(kind, case)
    q, k, v = (x.detach() for x in draw(case, torch.float32))
    for wrong in (
        (q[0], k, v),
        (q[..., 1:], k, v),
        (q, k, v[:, :, 1:]),
        (q[:1], k, v),
        (q[:, 1:], k, v) if (case.heads - 1) % case.kv_heads else (q, k[:, :0], v[:, :0]),
        (q.double(), k, v),
        (q.long(), k.long(), v.long()),
        (q, k, v[:, : case.kv_heads - 1]),
    ):
        _refused(lambda wrong=wrong: mech(*wrong), ValueError, TypeError)
    if mech.supports.packed:
        long = torch.zeros(2, case.tokens + 1, dtype=torch.int64, device=device())
        _refused(lambda: mech(q, k, v, group=long), ValueError)
        _refused(lambda: mech(q, k, v, group=torch.zeros(2, case.tokens, device=device())), TypeError)


# its numbers


@_contract()
def check_forward_float32(kind: Kind, case: Case) -> None:
    """Forward and gradients of q, k, v and the parameters equal the reference's, in float32."""
    _compare(kind, case, torch.float32)
    # numbers that bfloat16 does not hold: inputs rounded to it on the way would pass above
    mech, fine = build(kind, case), [1.1 * t.detach().float() for t in draw(case)]
    exact = _exact(mech, _cast(fine, torch.float64))
    _same(_run(mech, _cast(fine, torch.float32)), exact, case.tokens, "numbers of full float32 precision")


@_contract()
def check_forward_bfloat16(kind: Kind, case: Case) -> None:
    """The same in bfloat16."""
    _compare(kind, case, torch.bfloat16)


@_contract()
def check_forward_float64(kind: Kind, case: Case) -> None:
    """The same in float64, to float64's precision."""
    _compare(kind, case, torch.float64)


@_contract()
def check_lengths(kind: Kind, case: Case) -> None:
    """Lengths 1, block - 1, block, block + 1 and a prime: forward and gradients, float32."""
    for tokens in sorted({1, 2, case.block - 1, case.block, case.block + 1, 2 * case.block + 1, 67} - {0}):
        _compare(kind, case, torch.float32, tokens=tokens)


@_contract("value_width")
def check_value_width(kind: Kind, case: Case) -> None:
    """Values wider and narrower than keys."""
    for width in (1, case.width + 5):
        _compare(kind, _resized(case, value_width=width), torch.float32)


@_contract("grouped", "heads_apart")
def check_grouped_heads(kind: Kind, case: Case) -> None:
    """Each query head reads its own key head: as if the query heads of one key head came in separate calls."""
    case = _resized(case, heads=3 * case.kv_heads)
    mech = build(kind, case)
    got = _run(mech, draw(case, torch.float32))["out"]
    q, k, v = draw(case)
    repeat = case.heads // case.kv_heads
    exact = torch.stack([_float64(mech)(q[:, r::repeat], k, v) for r in range(repeat)], 2).flatten(1, 2)
    assert_within(got, exact, terms=case.tokens, name="grouped heads")


@_contract("cross", "is noncausal")
def check_cross(kind: Kind, case: Case) -> None:
    """Fewer and more rows than queries."""
    mech = build(kind, case)
    for rows in (case.tokens - 3, case.tokens + 3):
        (q, _, _), (_, k, v) = draw(case), draw(case, tokens=rows)
        exact = _exact(mech, (q, k, v))
        _same(_run(mech, _cast((q, k, v), torch.float32)), exact, case.tokens + 3, "cross")


@_contract()
def check_empty_batch(kind: Kind, case: Case) -> None:
    """A batch of nothing gives nothing, with gradients."""
    got = _run(build(kind, case), draw(case, torch.float32, batch=0))
    assert got["out"].shape == (0, case.heads, case.tokens, case.value_width)


@_contract()
def check_extreme_logits(kind: Kind, case: Case) -> None:
    """Logits in the thousands neither overflow nor give NaN, in the gradients neither."""
    mech = build(kind, case)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = draw(case, dtype)
        got = _run(mech, ((q * 100).detach().requires_grad_(), (k * 100).detach().requires_grad_(), v))
        for name, x in got.items():
            assert x.isfinite().all(), (
                f"{name}: {int((~x.isfinite()).sum())} values are not finite at huge logits, {dtype}"
            )


# what it must not read


@_contract("is causal")
def check_never_reads_the_future(kind: Kind, case: Case) -> None:
    """Changing q, k and v after a token leaves the outputs up to it bit-equal."""
    mech = build(kind, case)
    x = [t.detach() for t in draw(case, torch.float32)]
    before = mech(*x)
    for cut in sorted({1, case.block - 1, case.block, case.block + 1, case.tokens // 2, case.tokens - 1}):
        if 0 < cut < case.tokens:
            # the queries too: a pooled query lets a later token choose for an earlier one
            after = mech(*(torch.cat([t[:, :, :cut], -3 * t[:, :, cut:] + 1], 2) for t in x))
            _bit_equal(after[:, :, :cut], before[:, :, :cut], f"outputs before token {cut}, which the future reached")


@_contract()
def check_batch_independence(kind: Kind, case: Case) -> None:
    """A sequence's outputs do not depend on its neighbours in the batch, not even on their NaN."""
    mech = build(kind, case)
    x = [t.detach() for t in draw(case, torch.float32, batch=3)]
    before = mech(*x)
    poisoned = [t.clone() for t in x]
    for t in poisoned:
        t[1] = float("nan")
    after = mech(*poisoned)
    _bit_equal(after[[0, 2]], before[[0, 2]], "outputs of the other sequences of the batch")
    alone = mech(*(t[2:] for t in x))
    exact = _float64(mech)(*(t[2:].double() for t in x))
    assert_within(alone, exact, terms=case.tokens, name="one sequence alone")
    assert_within(before[2:], exact, terms=case.tokens, name="one sequence of three")


@_contract("packed")
def check_packed_documents(kind: Kind, case: Case) -> None:
    """Documents packed in a row are the sequences alone; padding gives 0 and is never read, though it holds NaN."""
    mech, T = build(kind, case), case.tokens
    group = packing(T, case.block)
    padding = group < 0
    exact = _by_document(_reference(mech), draw(case), group)
    for dtype in (torch.float32, torch.bfloat16):
        x = [
            t.detach().masked_fill(padding[:, None, :, None], float("nan")).requires_grad_() for t in draw(case, dtype)
        ]
        got = _run(lambda *x: mech(*x, group=group), x, parameters=mech)
        for name, t in got.items():
            if name in ("out", "dq", "dk", "dv"):
                where = padding[:, None, :, None].expand_as(t)
                assert (t[where] == 0).all(), (
                    f"{name} of padding must be 0, got {t[where].abs().max()} (NaN was put there)"
                )
        _same(got, exact, T, f"packed, {dtype}")
    # one row of ids for the whole batch
    got = mech.float()(*draw(case, torch.float32), group=group[:1])
    exact = _by_document(_reference(mech), draw(case), group[:1].expand(2, -1))
    assert_within(got, exact["out"], terms=T, name="packed, shared ids")


@_contract("packed")
def check_all_padding(kind: Kind, case: Case) -> None:
    """A sequence of nothing but padding gives 0 and no gradient, and one document gives what no group gives."""
    mech, T = build(kind, case), case.tokens
    padding, whole = torch.full((1, T), -1, device=device()), torch.full((2, T), 7, device=device())
    got = _run(lambda *x: mech(*x, group=padding), draw(case, torch.float32), parameters=mech)
    for name in ("out", "dq", "dk", "dv"):
        assert (got[name] == 0).all(), f"{name} must be 0 where everything is padding"
    one = _run(lambda *x: mech(*x, group=whole), draw(case, torch.float32), parameters=mech)
    exact = _exact(mech, draw(case))
    _same(one, exact, T, "one document")


# how it is called


@_contract()
def check_strided_views(kind: Kind, case: Case) -> None:
    """[B, T, H, D] views, expanded batches and slices of larger buffers give what contiguous tensors give."""
    mech = build(kind, case)
    exact = _exact(mech, draw(case))
    views = [
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in draw(case, torch.float32)
    ]
    _same(_run(mech, views), exact, case.tokens, "[B, T, H, D] views")

    sliced = []
    for t in draw(case, torch.float32):
        B, H, T, D = t.shape
        # what lies around the view is poison
        buffer = torch.full((B + 1, H + 2, T + 3, D + 4), float("nan"), device=device())
        buffer[1:, 1:-1, 2:-1, 3:-1] = t.detach()
        sliced.append(buffer[1:, 1:-1, 2:-1, 3:-1].requires_grad_())
    _same(_run(mech, sliced), exact, case.tokens, "slices")

    # a batch of one, expanded; and a gradient of stride 0
    one = [t.detach()[:1].requires_grad_() for t in draw(case, torch.float32)]
    out = mech(*(t.expand(2, -1, -1, -1) for t in one))
    grads = torch.autograd.grad(out.sum(), one)
    full = [t.detach()[:1].requires_grad_() for t in draw(case)]
    want = _reference(mech)(*(t.expand(2, -1, -1, -1) for t in full))
    wants = torch.autograd.grad(want.sum(), full)
    for name, got, right in zip(("out", "dq", "dk", "dv"), (out, *grads), (want, *wants), strict=True):
        assert_within(got, right, terms=2 * case.tokens, name=f"expanded batch: {name}")


@_contract()
def check_shapes_alone(kind: Kind, case: Case) -> None:
    """On the meta device, which has no numbers, out has its shape and dtype, as who builds a model there asks."""
    mech = build(kind, case).bfloat16().to("meta")
    out = mech(*(t.detach().to("meta") for t in draw(case, torch.bfloat16)))
    assert out.is_meta
    assert (tuple(out.shape), out.dtype) == ((2, case.heads, case.tokens, case.value_width), torch.bfloat16)


@_contract("training")
def check_other_derivatives(kind: Kind, case: Case) -> None:
    """Derivatives in forward mode and by torch.func are right, or refused: PyTorch may leave them out silently."""
    # the reference is made now: no module is copied inside a transform
    mech = build(kind, case)
    reference = _reference(mech)
    x, exactly = ([t.detach() for t in draw(case, dtype)] for dtype in (torch.float32, torch.float64))
    for at, name in enumerate("qkv"):
        along = normal(*x[at].shape, seed=at, dtype=torch.float32)
        calls = (mech, x), (reference, exactly)
        got_of, exact_of = (lambda t, f=f, x=x, at=at: f(*x[:at], t, *x[at + 1 :]) for f, x in calls)
        exact = torch.func.jvp(exact_of, (exactly[at],), (along.double(),))[1]
        with suppress(NotImplementedError), forward_ad.dual_level():
            got = forward_ad.unpack_dual(got_of(forward_ad.make_dual(x[at], along))).tangent
            assert got is not None, f"{name}: the tangent was left out"
            assert_within(got, exact, terms=case.tokens, name=f"{name}, forward mode")
        with suppress(NotImplementedError):
            got = torch.func.jvp(got_of, (x[at],), (along,))[1]
            assert_within(got, exact, terms=case.tokens, name=f"{name}, torch.func.jvp")
        with suppress(NotImplementedError):
            got = torch.func.grad(lambda t, f=got_of: f(t).sum())(x[at])
            exact = torch.func.grad(lambda t, f=exact_of: f(t).sum())(exactly[at])
            assert_within(got, exact, terms=case.tokens, name=f"{name}, torch.func.grad")


@_contract()
def check_deterministic(kind: Kind, case: Case) -> None:
    """The same call gives the same bits, with uninitialised memory full of NaN as well."""
    mech = build(kind, case)
    first = _run(mech, draw(case, torch.float32))
    with poisoned_memory():
        again = _run(mech, draw(case, torch.float32))
    for name in first:
        _bit_equal(again[name], first[name], f"{name} of a second run over NaN-filled memory")


@_contract("decode", "is causal")
def check_decode_over_nan_memory(kind: Kind, case: Case) -> None:
    """The decode path, too, reads nothing that it did not write."""
    mech = build(kind, case)
    x = [t.detach() for t in draw(case, torch.float32)]
    first = _extend(mech, x, [case.tokens - 3, 1, 2])[0]
    with poisoned_memory():
        again = _extend(mech, x, [case.tokens - 3, 1, 2])[0]
    _bit_equal(again, first, "extend over NaN-filled memory")


@_contract()
def check_autocast(kind: Kind, case: Case) -> None:
    """Under autocast, bfloat16 inputs give what they give without, forward and backward."""
    mech = build(kind, case)
    exact = _exact(mech, draw(case))
    with torch.autocast(device().type, dtype=torch.bfloat16):
        # parameters stay in float32, as autocast has them
        got = _run(lambda *x: mech(*x), draw(case, torch.bfloat16))
    _same(got, {name: exact[name] for name in got}, case.tokens, "autocast")
    if mech.supports.decode and mech.causal:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            out, _ = _extend(mech, [t.detach() for t in draw(case, torch.bfloat16)], [case.tokens - 3, 1, 2])
        assert_within(out, exact["out"], terms=case.tokens, name="autocast: extend")


@_contract()
def check_save_and_load(kind: Kind, case: Case) -> None:
    """A second mechanism with the first one's state_dict gives the same bits."""
    mech, other = build(kind, case), build(kind, case, seed=1)
    file = io.BytesIO()
    torch.save(mech.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = [t.detach() for t in draw(case, torch.float32)]
    _bit_equal(other(*x), mech(*x), "outputs after loading")


@_contract()
def check_compiles(kind: Kind, case: Case) -> None:
    """torch.compile(fullgraph=True) gives the eager numbers, forward and backward. Slow: a compiler runs."""
    check_traces(kind, case, backend="inductor")


def check_traces(kind: Kind, case: Case, backend: str = "aot_eager") -> None:
    """The graph is whole, shapes and dtypes of the fakes are right, gradients included; without generating code."""
    mech = build(kind, case)
    torch._dynamo.reset()
    compiled = torch.compile(mech, fullgraph=True, backend=backend)
    # long enough for two levels of anything made of blocks: tracing time grows with the levels
    tokens = min(case.tokens, 4 * case.block + 3)
    exact = _exact(mech, draw(case, tokens=tokens))
    _same(_run(compiled, draw(case, torch.float32, tokens=tokens), parameters=mech), exact, tokens, "compiled")


# its state


@_contract("decode", "is causal")
def check_extend_equals_forward(kind: Kind, case: Case) -> None:
    """Any chunking of the prefill, then token by token, gives one forward's numbers."""
    mech, T, b = build(kind, case), case.tokens, case.block
    exact = _reference(mech)(*draw(case)).detach()
    for dtype in (torch.float32, torch.bfloat16):
        x = [t.detach() for t in draw(case, dtype)]
        for pieces in (
            [T],
            [1] * T,
            [b] * (T // b) + ([T % b] if T % b else []),
            _pieces(T, (b + 1, b - 1, 1, 3)),
            _pieces(T, (2 * b + 3, 1, 1, b // 2 or 1)),
            [T - 5, 1, 1, 1, 1, 1],
        ):
            got, state = _extend(mech, x, pieces)
            assert_within(got, exact, terms=T, name=f"extend by {_short(pieces)}, {dtype}")
            assert state.tokens == T, f"state.tokens is {state.tokens} after {T} tokens"


@_contract("decode", "is causal")
def check_state_is_immutable(kind: Kind, case: Case) -> None:
    """extend returns a new state; the old one keeps its numbers and can be continued again."""
    mech, cut = build(kind, case), case.tokens // 2 + 1
    x = [t.detach() for t in draw(case, torch.float32)]
    _, old = _extend(mech, x, [cut])
    kept = {name: t.clone() for name, t in old.tensors().items()}
    rest = [t[:, :, cut:] for t in x]
    first, _ = _extend(mech, rest, [1] * (case.tokens - cut), old)
    for name, t in old.tensors().items():
        _bit_equal(t, kept[name], f"state tensor {name} after further extends")
    assert old.tokens == cut, f"state.tokens went from {cut} to {old.tokens}"
    again, _ = _extend(mech, rest, [1] * (case.tokens - cut), old)
    _bit_equal(again, first, "a second continuation of one state")


@_contract("decode", "is causal")
def check_refuses_states_that_do_not_fit(kind: Kind, case: Case) -> None:
    """The state of another batch, or of another mechanism, is refused, never read."""
    mech = build(kind, case)
    q, k, v = (t.detach() for t in draw(case, torch.float32))
    _, state = mech.extend(q, k, v)
    _refused(lambda: mech.extend(q[:1], k[:1], v[:1], state), ValueError, TypeError)
    if mech.remembers is not State:
        _refused(lambda: mech.extend(q, k, v, State(3)), TypeError)


@_contract("decode", "is causal")
def check_state_api(kind: Kind, case: Case) -> None:
    """copy, tensors, replaced, reorder and nbytes of a state, at several lengths."""
    mech = build(kind, case)
    x = [t.detach() for t in draw(case, torch.float32, batch=3)]
    for cut in sorted({1, case.block, case.tokens // 2 + 1}):
        rest, pieces = [t[:, :, cut:] for t in x], [1, 2, 3]
        _, state = _extend(mech, x, [cut])
        want, _ = _extend(mech, rest, pieces, state)
        assert state.tokens == cut
        tensors = state.tensors()
        assert tensors, "a state without tensors remembers nothing"
        assert state.nbytes == sum(t.nbytes for t in tensors.values())
        for name, t in tensors.items():
            assert t.shape[0] == 3, f"state tensor {name} is {list(t.shape)}; the batch of 3 comes first"

        copied = state.copy()
        for name, t in copied.tensors().items():
            assert t.numel() == 0 or t.untyped_storage().data_ptr() != tensors[name].untyped_storage().data_ptr(), (
                f"copy shares {name} with the original"
            )
        _bit_equal(_extend(mech, rest, pieces, copied)[0], want, "outputs from a copied state")

        # what a file keeps: the tensors, and a state of the same length to put them in
        file = io.BytesIO()
        torch.save({name: t.clone() for name, t in tensors.items()}, file)
        file.seek(0)
        blank = state.replaced({name: torch.full_like(t, -1) for name, t in tensors.items()})
        loaded = blank.replaced(torch.load(file, weights_only=True))
        _bit_equal(_extend(mech, rest, pieces, loaded)[0], want, "outputs from a saved and loaded state")

        beams = torch.tensor([2, 0, 0, 1], device=device())
        got, after = _extend(mech, [t[beams] for t in rest], pieces, state.reorder(beams))
        exact, _ = _extend(_float64(mech), [t[beams].double() for t in rest], pieces, _to(state.reorder(beams)))
        assert_within(got, exact, terms=case.tokens, name="outputs from a reordered state")
        order = torch.tensor([2, 0, 1], device=device())
        picked, _ = _extend(mech, [t[order] for t in rest], pieces, state.reorder(order))
        _bit_equal(picked, want[[2, 0, 1]], "outputs from a permuted state")
        assert after.tensors().keys() == _extend(mech, rest, pieces, state)[1].tensors().keys()


@_contract("decode", "is causal")
def check_state_crop(kind: Kind, case: Case) -> None:
    """Cropping g tokens gives the state from before them; a state that cannot says so."""
    # bounded states go back as far as they were told to
    if "rewind" in inspect.signature(_class(kind)).parameters:
        case = replace(case, options={**case.options, "rewind": 4})
    mech = build(kind, case)
    x = [t.detach() for t in draw(case, torch.float32)]
    exact = _reference(mech)(*draw(case)).detach()
    for cut in sorted({5, case.block + 2, case.tokens - 8}):
        for drop in (0, 1, 4):
            _, state = _extend(mech, x, _pieces(cut, (max(cut - 3, 1), 1)))
            # a draft that is not what the text goes on with
            draft = [-2 * t[:, :, cut : cut + drop] + 1 for t in x]
            if drop:
                _, state = _extend(mech, draft, [drop], state)
            if type(state).crop is State.crop:
                _refused(lambda state=state, drop=drop: state.crop(drop))
                return
            cropped = state.crop(drop)
            assert cropped.tokens == cut, f"{cut} + {drop} tokens cropped by {drop} are {cropped.tokens}"
            got, _ = _extend(mech, [t[:, :, cut:] for t in x], _pieces(case.tokens - cut, (1, 1, 3)), cropped)
            assert_within(got, exact[:, :, cut:], terms=case.tokens, name=f"{cut} + {drop} tokens cropped by {drop}")
    _refused(lambda: state.crop(state.tokens + 1), ValueError)
    _refused(lambda: state.crop(-1), ValueError)


@_contract("decode", "is causal")
def check_extend_empty_batch(kind: Kind, case: Case) -> None:
    """A batch of nothing can be extended."""
    out, state = _extend(
        build(kind, case), [t.detach() for t in draw(case, torch.float32, batch=0)], [case.tokens - 1, 1]
    )
    assert out.shape == (0, case.heads, case.tokens, case.value_width)
    assert state.tokens == case.tokens


@_contract("rotary")
def check_rotary(kind: Kind, case: Case) -> None:
    """A rotation by 0 changes nothing, a shift of all positions neither (where relative); extend rotates alike."""
    mech, T = build(kind, case), case.tokens
    exact = _reference(mech)(*draw(case)).detach()
    assert_within(mech(*draw(case, torch.float32), rotary=lambda x, position: x), exact, terms=T, name="no rotation")
    turned = _float64(mech)(*draw(case), rotary=rotate).detach()
    assert not torch.allclose(turned, exact), "rotary has no effect"
    if mech.supports.relative:
        shifted = _float64(mech)(*draw(case), rotary=lambda x, position: rotate(x, position + 100))
        assert_within(shifted.float(), turned, terms=T, name="shifted positions")
    assert_within(mech(*draw(case, torch.float32), rotary=rotate), turned, terms=T, name="rotated, float32")
    if mech.supports.decode and mech.causal:
        x = [t.detach() for t in draw(case, torch.float32)]
        for pieces in ([T], _pieces(T, (case.block + 1, 1, 2))):
            got, _ = _extend(mech, x, pieces, rotary=rotate)
            assert_within(got, turned, terms=T, name=f"rotated, extend by {_short(pieces)}")
    if mech.supports.packed:
        group = packing(T, case.block)
        got = mech(*draw(case, torch.float32), group=group, rotary=rotate)
        want = _by_document(lambda *x: _float64(mech)(*x, rotary=rotate), draw(case), group)["out"]
        assert_within(got, want, terms=T, name="rotated and packed")


# helpers, for tests of single mechanisms as well


def build(kind: Kind, case: Case, *, seed: int = 0) -> Mechanism:
    """The case's mechanism; parameters are moved off their initial values, to numbers that bfloat16 holds."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        mech = _class(kind)(**case.options).to(device())
    with torch.no_grad():
        for i, p in enumerate(mech.parameters()):
            p.copy_((p + 0.25 * normal(*p.shape, seed=1000 * seed + i + 77, dtype=p.dtype)).bfloat16())
    return mech


def packing(tokens: int, block: int) -> Tensor:
    """[2, tokens] document ids: short and long runs, padding between and at the ends, an id that returns later."""
    runs = (
        [(-1, 2), (4, block + 3), (0, 1), (4, 2 * block - 1), (-2, 3), (2, block), (9, tokens)],
        [(3, 2 * block + 5), (-1, 1), (1, 2), (3, block - 1), (5, block // 2 or 1), (-1, tokens)],
    )
    return torch.stack([torch.cat([torch.full((n,), i) for i, n in row])[:tokens] for row in runs]).to(device())


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """A rotation of the first two thirds of the width, at frequencies 0.5, 0.25, ...; positions [T] or [B, T]."""
    half = x.shape[-1] // 3
    speed = 0.5 ** torch.arange(1, half + 1, device=x.device)
    angle = position.to(torch.promote_types(x.dtype, torch.float32))[..., None] * speed
    angle = angle[:, None] if angle.dim() == 3 else angle
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest], -1)
    return turned.to(x.dtype)


@contextmanager
def poisoned_memory():
    """Uninitialised memory is full of NaN (integers: the largest)."""
    switch: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switch.fill_uninitialized_memory
    # the filling is part of the deterministic mode; what has no such mode on the GPU is not what is tested
    torch.use_deterministic_algorithms(True, warn_only=device().type == "cuda")
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switch.fill_uninitialized_memory = before[1]


def _class(kind: Kind) -> type[Mechanism]:
    return mechanisms.get(kind) if isinstance(kind, str) else kind


def _float64(mech: Mechanism) -> Mechanism:
    return copy.deepcopy(mech).double()


def _reference(mech: Mechanism) -> Callable[..., Tensor]:
    """The reference in float64. It names no device, so that of its inputs is the default while it runs."""
    wide = _float64(mech)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with q.device:
            return wide.reference(q, k, v)

    return reference


def _exact(mech: Mechanism, x: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the reference gives in float64, gradients of the parameters included."""
    wide = _float64(mech)
    with x[0].device:
        return _run(wide.reference, x)


def _cast(x: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in x]


def _resized(case: Case, **sizes: int) -> Case:
    """The case with other head counts or widths, in its options as well where they name them."""
    options = {name: sizes.get(name, x) for name, x in case.options.items()}
    return replace(case, options=options, **sizes)


def _run(f: Callable[..., Tensor], x: Sequence[Tensor], parameters: Mechanism | None = None) -> dict[str, Tensor]:
    """out and the gradients of everything that has one, for an output gradient drawn from a fixed seed."""
    owner = parameters if parameters is not None else getattr(f, "__self__", f)
    leaves = {"dq": x[0], "dk": x[1], "dv": x[2]}
    if isinstance(owner, Mechanism):
        owner.to(x[0].dtype)
        if not owner.supports.training:
            return {"out": f(*(t.detach() for t in x))}
        leaves |= {f"d {name}": p for name, p in owner.named_parameters()}
    out = f(*x)
    assert out.dtype == x[0].dtype, f"out is {out.dtype}, q is {x[0].dtype}"
    d_out = normal(*out.shape, seed=99, dtype=out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), d_out, allow_unused=True)
    found = {}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        # a parameter may have no part in so short a sequence; q, k and v have
        assert grad is not None or leaf.numel() == 0 or name.startswith("d "), f"{name}: no gradient"
        found[name] = torch.zeros_like(leaf) if grad is None else grad
    return {"out": out.detach(), **found}


def _same(got: Mapping[str, Tensor], exact: Mapping[str, Tensor], terms: int, what: str) -> None:
    missing = [name for name in exact if name not in got]
    assert not missing, f"{what}: no {', '.join(missing)}"
    for name in exact:
        mine, right = got[name], exact[name]
        if name != "dv" and name != "out" and not right.any():
            # what cancels to nothing, as with a single token, has no size of its own: that of dv is what cancels
            mine, right = (torch.cat([x.flatten(), y["dv"].flatten()]) for x, y in ((mine, got), (right, exact)))
        assert_within(mine, right, terms=terms, name=f"{what}: {name}")


def _compare(kind: Kind, case: Case, dtype: torch.dtype, tokens: int | None = None) -> None:
    mech = build(kind, case)
    exact = _exact(mech, draw(case, tokens=tokens))
    got = _run(mech, draw(case, dtype, tokens=tokens))
    T = case.tokens if tokens is None else tokens
    _same(got, exact, T, f"T={T}, {dtype}")


def _by_document(f: Callable[..., Tensor], x: Sequence[Tensor], group: Tensor) -> dict[str, Tensor]:
    """f on each run of equal ids by itself, 0 at negative ids, and the gradients."""

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for b in range(q.shape[0]):
            ids, start, parts = group[b].tolist(), 0, []
            for stop in range(1, len(ids) + 1):
                if stop == len(ids) or ids[stop] != ids[start]:
                    own = [t[b : b + 1, :, start:stop] for t in (q, k, v)]
                    zero = q.new_zeros(1, q.shape[1], stop - start, v.shape[-1])
                    parts.append(f(*own) if ids[start] >= 0 else zero)
                    start = stop
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows)

    return _run(packed, x)


def _extend(
    mech: Mechanism, x: list[Tensor], pieces: list[int], state: State | None = None, **options: Any
) -> tuple[Tensor, State]:
    """The first tokens of x in these pieces, after `state`."""
    mech.to(x[0].dtype)
    outs = []
    with torch.no_grad():
        for q, k, v in zip(*(t[:, :, : sum(pieces)].split(pieces, 2) for t in x), strict=True):
            out, state = mech.extend(q, k, v, state, **options)
            outs.append(out)
    assert state is not None
    return torch.cat(outs, 2), state


def _pieces(tokens: int, pattern: tuple[int, ...]) -> list[int]:
    """`tokens` cut into pieces of these lengths, over and over."""
    pieces = []
    while tokens:
        piece = min(tokens, pattern[len(pieces) % len(pattern)])
        pieces.append(piece)
        tokens -= piece
    return pieces


def _to(state: State) -> State:
    """The state in float64; integer tensors stay."""
    return state.replaced({n: t.double() if t.is_floating_point() else t for n, t in state.tensors().items()})


def _bit_equal(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all(), (
        f"{what}: {int((~same).sum())} of {same.numel()} values changed, by up to {(got - want).abs().max():.1e}"
    )


def _refused(call: Callable[[], object], *kinds: type[Exception]) -> None:
    kinds = kinds or (NotImplementedError,)
    wanted = " or ".join(k.__name__ for k in kinds)
    try:
        call()
    except Exception as error:
        if not isinstance(error, kinds) or len(str(error)) < 15:
            raise AssertionError(f"expected {wanted} and a reason, got {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"expected {wanted}, but the call went through")


def _short(pieces: list[int]) -> str:
    return f"{len(pieces)} pieces of {', '.join(map(str, pieces[:4]))}{', ...' if len(pieces) > 4 else ''}"
