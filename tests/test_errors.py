"""Every refusal: the kind of error, and a message that says who, what was expected, what was given."""

import inspect
import re

import pytest
import torch

import farfield as ff
from farfield.select import static
from farfield.testing.inputs import normal
from farfield.types import Layout, Partial, Rows

B, H, G, T, S, D, E = 2, 4, 2, 12, 10, 6, 5


def q(*shape, dtype=torch.float32):
    return normal(*(shape or (B, H, T, D)), dtype=dtype)


def rows(**parts):
    return Rows(**{"k": q(B, G, S, D), "v": q(B, G, S, E)} | parts)


def plan(**sizes):
    return static.full(**{"tokens": T, "rows": S, "q_block": 4, "k_block": 4} | sizes)


def attend(**changes):
    options = {"q": q(), "rows": rows(), "layout": plan()} | changes
    return ff.attend(options.pop("q"), options.pop("rows"), options.pop("layout"), **options)


def lists(*shape):
    return Layout(torch.zeros(*shape, 3, 1, dtype=torch.int32), torch.ones(*shape, 3, dtype=torch.int32), 4, 4, T, S)


I = torch.arange  # noqa: E741

ATTEND = {
    "q is not 4-D": (
        lambda: attend(q=q(H, T, D)),
        (ValueError, TypeError),
        r"q must be .*\[B, H, T, D\].*\[4, 12, 6\]",
    ),
    "q is integer": (lambda: attend(q=q().long()), TypeError, r"q must be floating point.*int64"),
    "no sources": (lambda: attend(rows=[], layout=None), ValueError, r"at least one \(rows, layout\)"),
    "a tensor in the place of rows": (lambda: attend(rows=q()), TypeError, r"got a tensor; use Rows\(k, v\)"),
    "no layout": (lambda: attend(layout=None), TypeError, r"source 0 must be \(Rows, Layout\), got \(Rows, NoneType\)"),
    "a tensor as rows": (lambda: attend(rows=[(q(), plan())], layout=None), TypeError, r"got \(Tensor, Layout\)"),
    "k of another dtype": (
        lambda: attend(rows=rows(k=q(B, G, S, D).double())),
        TypeError,
        r"k is torch\.float64 but q is",
    ),
    "v of another dtype": (
        lambda: attend(rows=rows(v=q(B, G, S, E).half())),
        TypeError,
        r"v is torch\.float16 but q is",
    ),
    "k of another width": (lambda: attend(rows=rows(k=q(B, G, S, D + 1))), ValueError, r"do not fit q \[2, 4, 12, 6\]"),
    "k and v of two lengths": (
        lambda: attend(rows=rows(v=q(B, G, S + 1, E))),
        ValueError,
        r"\[2, 2, 10, 6\].*\[2, 2, 11, 5\]",
    ),
    "another batch": (lambda: attend(rows=rows(k=q(3, G, S, D))), ValueError, r"k must be \[B=2.*\[3, 2, 10, 6\]"),
    "heads do not divide": (
        lambda: attend(rows=rows(k=q(B, 3, S, D), v=q(B, 3, S, E))),
        ValueError,
        "4 query heads are not a multiple of 3",
    ),
    "layout of another T": (
        lambda: attend(layout=plan(tokens=T + 1)),
        ValueError,
        r"built for 13 queries, but q has 12\. Build",
    ),
    "layout of another S": (
        lambda: attend(layout=plan(rows=S + 1)),
        ValueError,
        r"built for 11 rows, but there are 10\. Build",
    ),
    "layout of other heads": (
        lambda: attend(layout=lists(1, 3)),
        ValueError,
        r"index must be \[1\|2, 1\|4, N, P\], got \[1, 3",
    ),
    "layout of another batch": (lambda: attend(layout=lists(3, 1)), ValueError, r"index must be .*got \[3, 1"),
    "layout elsewhere": (
        lambda: attend(layout=plan().to("meta")),
        ValueError,
        r"layout is on meta, q on cpu; use layout\.to",
    ),
    "two q_blocks": (
        lambda: attend(rows=[(rows(), plan()), (rows(), plan(q_block=6))], layout=None),
        ValueError,
        "share a q_block, got 4 and 6",
    ),
    "two value widths": (
        lambda: attend(rows=[(rows(), plan()), (rows(v=q(B, G, S, 7)), plan())], layout=None),
        ValueError,
        "share a value width, got 5 and 7",
    ),
    "row groups alone": (
        lambda: attend(rows=rows(group=I(S))),
        ValueError,
        "row groups but the queries have none; pass group=",
    ),
    "query groups alone": (lambda: attend(group=I(T)), ValueError, r"groups but no source has; set Rows\.group"),
    "positions of another length": (
        lambda: attend(position=I(T + 1)),
        ValueError,
        r"position must be \[T=12\].*got \[13\]",
    ),
    "positions as floats": (
        lambda: attend(position=I(T).float()),
        TypeError,
        r"position must be integer, got torch\.float32",
    ),
    "positions of key heads": (lambda: attend(position=I(T).expand(B, G, T)), ValueError, "position must be"),
    "ends of another length": (
        lambda: attend(rows=rows(end=I(S - 1))),
        ValueError,
        r"source 0: end must be \[S=10\].*got \[9\]",
    ),
    "ends of query heads": (
        lambda: attend(rows=rows(end=I(S).expand(B, H, S))),
        ValueError,
        r"end must be .*got \[2, 4, 10\]",
    ),
    "an integer bias": (
        lambda: attend(rows=rows(bias=I(S))),
        TypeError,
        "bias must be floating point, got torch.int64",
    ),
    "a bias of 3 heads": (lambda: attend(rows=rows(bias=q(1, 3, S))), ValueError, r"bias must be .*got \[1, 3, 10\]"),
    "a boolean group": (
        lambda: attend(rows=rows(group=I(S) > 3), group=I(T)),
        TypeError,
        "group must be integer, got torch.bool",
    ),
    "a bias elsewhere": (
        lambda: attend(rows=rows(bias=torch.zeros(S, device="meta"))),
        ValueError,
        "bias is on meta, q on cpu",
    ),
}


def partial(tokens=3, width=2):
    return Partial(torch.zeros(1, 1, tokens, width), torch.zeros(1, 1, tokens))


def scan(**changes):
    options = {"q": q(), "k": q(B, G, T, D), "v": q(B, G, T, E)} | changes
    return ff.scan(options.pop("q"), options.pop("k"), options.pop("v"), **options)


OPERATIONS = {
    "merge of nothing": (lambda: ff.merge(), ValueError, "merge: needs at least one"),
    "merge of two shapes": (lambda: ff.merge(partial(), partial(4)), ValueError, r"\[1, 1, 3, 2\] and \[1, 1, 4, 2\]"),
    "scan of another length": (
        lambda: scan(k=q(B, G, S, D), v=q(B, G, S, E)),
        ValueError,
        "q has 12 tokens, k and v have 10",
    ),
    "merge of tensors": (lambda: ff.merge(q(), q()), TypeError, "takes what attend returns, Partials, got Tensor"),
    "scan with a number as decay": (lambda: scan(decay=-0.1), TypeError, "a tensor, Decays or None, got -0.1"),
    "summarize of a tensor": (lambda: ff.summarize(q()), TypeError, r"must be Rows, as in Rows\(k, v\), got Tensor"),
    "summarize with a pool's name": (
        lambda: ff.summarize(rows(), block=4, rank=2, pool="mean"),
        TypeError,
        r"pool must be a Pool, such as MeanPool\(\), got 'mean'",
    ),
    "summarize of keys and values of two lengths": (
        lambda: ff.summarize(rows(v=q(B, G, S - 1, E)), block=4, rank=2),
        ValueError,
        r"summarize: k and v must agree in heads and rows, got k \[2, 2, 10, 6\] and v \[2, 2, 9, 5\]",
    ),
    "summarize of integers": (
        lambda: ff.summarize(rows(k=q(B, G, S, D).long()), block=4, rank=2),
        TypeError,
        "summarize: k must be floating point, got torch.int64",
    ),
    "summarize of two dtypes": (
        lambda: ff.summarize(rows(v=q(B, G, S, E).double()), block=4, rank=2),
        TypeError,
        "summarize: k and v must share a dtype, got torch.float32 for k and torch.float64 for v",
    ),
    "summarize of one head's rows": (
        lambda: ff.summarize(rows(k=q(B, S, D), v=q(B, S, E)), block=4, rank=2),
        ValueError,
        r"summarize: k must be \[batch, heads, tokens, width\], got shape \[2, 10, 6\]",
    ),
    "a layout of a number in quotes": (
        lambda: static.full(tokens="12"),
        ValueError,
        "tokens must be a whole number of at least 1, got '12'",
    ),
    "scan in chunks of 0": (lambda: scan(chunk=0), ValueError, "chunk must be at least 1, got 0"),
    "scan with decays of another shape": (
        lambda: scan(decay=-torch.ones(T)),
        ValueError,
        r"decay must be \[H\] = \[4\] .*got \[12\]",
    ),
    "scan with decays of key heads": (
        lambda: scan(decay=-torch.ones(B, G, T)),
        ValueError,
        r"decay must be .*got \[2, 2, 12\]",
    ),
    "scan with integer decays": (
        lambda: scan(decay=-torch.ones(H).long()),
        TypeError,
        "decay must be floating point, got torch.int64",
    ),
    "scan with another state": (
        lambda: scan(state=torch.zeros(B, H, E, D)),
        ValueError,
        r"state must be .*\[2, 4, 6, 5\], got \[2, 4, 5, 6\]",
    ),
    "scan with a state elsewhere": (
        lambda: scan(state=torch.zeros(B, H, D, E, device="meta")),
        ValueError,
        "state is on meta, q on cpu",
    ),
    "attend in forward mode": (
        lambda: torch.func.jvp(lambda b: attend(rows=rows(bias=b)).out, (q(S),), (q(S),)),
        NotImplementedError,
        "no derivatives in forward mode .*; use autograd's backward",
    ),
    "scan in forward mode, from a state": (
        lambda: torch.func.jvp(lambda s: scan(state=s), (q(B, H, D, E),), (q(B, H, D, E),)),
        NotImplementedError,
        "no derivatives in forward mode",
    ),
    "attend under torch.func.grad": (
        lambda: torch.func.grad(lambda x: attend(q=x).out.sum())(q()),
        NotImplementedError,
        r"no derivatives by torch.func \(grad, .*; use backward",
    ),
    "summarize with a rank that does not divide": (
        lambda: ff.summarize(rows(), block=8, rank=3),
        ValueError,
        "rank must divide block.*block=8, rank=3",
    ),
    "multipole with a near field off the blocks": (
        lambda: ff.select.multipole(tokens=9, block=4, near=6),
        ValueError,
        "near must be a positive multiple of block=4, got 6",
    ),
    "a window of nothing": (
        lambda: static.window(tokens=9, width=0),
        ValueError,
        "width must be a whole number .* 1, got 0",
    ),
    "union of other blocks": (lambda: plan().union(plan(k_block=5)), ValueError, "differ in k_block, 4 and 5"),
}


def mechanism(name, **options):
    return ff.mechanisms.make(name, **options)


def call(name="full", group=None, rotary=None, shape=(B, H, T, D), **options):
    return mechanism(name, **options)(q(*shape), q(B, G, T, D), q(B, G, T, E), group=group, rotary=rotary)


def extended(batches):
    state = None
    for batch in batches:
        _, state = mechanism("full").extend(q(batch, H, 3, D), q(batch, G, 3, D), q(batch, G, 3, D), state)


def sdpa(*args, heads=G, **options):
    return ff.attention(q(), q(B, heads, T, D), q(B, heads, T, E), *args, **options)


def later(**changed):
    """A call of opened fma after options were changed."""
    mech = ff.FMA(block=2, near=2, rank=1, open=1)
    for name, value in changed.items():
        setattr(mech, name, value)
    return mech(q(), q(B, G, T, D), q(B, G, T, E))


MECHANISMS = {
    "an unknown name": (lambda: mechanism("fmaa"), ValueError, r"no mechanism 'fmaa'; did you mean fma\b.*All: .*full"),
    "a name like nothing": (lambda: mechanism("zzzzzzz"), ValueError, "no mechanism 'zzzzzzz'. All: aaren"),
    "an unknown option": (lambda: mechanism("fma", blok=3), ValueError, "fma: no option blok; its options are .*block"),
    "an option that is no number": (
        lambda: mechanism("window", width="half"),
        ValueError,
        "window: width must be a whole number, got 'half'",
    ),
    "an option that is no whole number": (
        lambda: mechanism("fma", horizon=2.5),
        ValueError,
        "fma: horizon must be a whole number or None, got 2.5",
    ),
    "an option that is not yes or no": (
        lambda: mechanism("fma", shared="no"),
        ValueError,
        "fma: shared must be true or false, got 'no'",
    ),
    "3-D inputs": (
        lambda: call(shape=(H, T, D)),
        ValueError,
        r"full: q must be \[batch, heads, tokens, width\], got shape \[4, 12, 6\]",
    ),
    "another width": (lambda: call(shape=(B, H, T, D + 1)), ValueError, "full: q has width 7, k has 6"),
    "another batch": (lambda: call(shape=(3, H, T, D)), ValueError, "q has batch 3, k has 2"),
    "heads that do not divide": (
        lambda: call(shape=(B, 3, T, D)),
        ValueError,
        "3 query heads are not a multiple of 2 key heads",
    ),
    "rotary that is no function": (
        lambda: call("fma", rotary=3, block=4, near=4, rank=2),
        TypeError,
        "fma: rotary must be a function of x and position, got int",
    ),
    "a state of another batch": (
        lambda: extended((2, 1)),
        ValueError,
        "full: the state holds 2 sequences, got 1",
    ),
    "a state of another mechanism": (
        lambda: mechanism("full").extend(q(), q(), q(), mechanism("window").extend(q(), q(), q())[1]),
        TypeError,
        "full: goes on from a state of its own, Cache, got WindowState",
    ),
    "a state of other sizes": (
        lambda: mechanism("window", width=9).extend(q(), q(), q(), mechanism("window").extend(q(), q(), q())[1]),
        ValueError,
        "window: the state was made with width=256, not width=9; begin a new one",
    ),
    "cross-attention where there is none": (
        lambda: call("window", shape=(B, H, T + 1, D)),
        NotImplementedError,
        r"window: self-attention only, but q has 13 tokens and k 12; tensors are \[batch, heads, tokens, width\]",
    ),
    "groups as floats": (
        lambda: call("fma", group=torch.zeros(B, T), block=4, near=4, rank=2),
        TypeError,
        "fma: group holds integer document ids, got torch.float32",
    ),
    "groups of another shape": (
        lambda: call(group=I(T)),
        ValueError,
        r"full: group must be \[B, T\] = \[2, 12\], got \[12\]",
    ),
    "rotary where it is not placed": (
        lambda: call(rotary=lambda x, p: x),
        NotImplementedError,
        "full: does not place rotations itself; rotate q and k",
    ),
    "fma with a rank that does not divide": (
        lambda: mechanism("fma", block=8, rank=3),
        ValueError,
        "rank must divide block",
    ),
    "fma with a near field off the blocks": (
        lambda: mechanism("fma", block=8, near=12, rank=2),
        ValueError,
        "near must be a positive multiple of block=8, got 12",
    ),
    "fma with too many sinks": (
        lambda: mechanism("fma", block=8, near=8, rank=2, sinks=9),
        ValueError,
        r"sinks must lie in 0 \.\. block=8, got 9",
    ),
    "fma with an unknown pool": (
        lambda: mechanism("fma", pool="max"),
        ValueError,
        "pool must be one of mean, learned, .*'max'",
    ),
    "fma with a pool without its sizes": (
        lambda: mechanism("fma", pool="learned"),
        ValueError,
        "pool='learned' has parameters and needs kv_heads",
    ),
    "fma with unknown queries": (
        lambda: mechanism("fma", queries="some"),
        ValueError,
        "queries must be 'kept' or 'pooled', got 'some'",
    ),
    "causal fma with pooled queries": (
        lambda: mechanism("fma", queries="pooled"),
        NotImplementedError,
        "leak the future",
    ),
    "a window of nothing": (lambda: mechanism("window", width=0), ValueError, "width=0"),
    "a scale that is no number": (
        lambda: ff.FMA(scale="1"),
        ValueError,
        "fma: scale must be a number or None, got '1'",
    ),
    "fma with a pool that is no name": (
        lambda: ff.FMA(pool=["mean"]),
        ValueError,
        r"pool must be one of mean, .* or a Pool, got \['mean'\]",
    ),
    "fma for no key heads": (lambda: ff.FMA(kv_heads=0), ValueError, "must be at least 1, got .*'kv_heads': 0"),
    "a level bias of other heads": (
        lambda: ff.FMA(level_bias=True, kv_heads=1, levels=4)(q(), q(B, G, T, D), q(B, G, T, E)),
        ValueError,
        "level_bias was made for kv_heads=1, but k has 2 heads",
    ),
    "a learned score of another width": (
        lambda: ff.FMA(score="learned", kv_heads=2, width=5)(q(), q(B, G, T, D), q(B, G, T, E)),
        ValueError,
        r"score='learned' was made for kv_heads, width = \[2, 5\], but k has \[2, 6\]",
    ),
    "a learned score of no queries": (
        lambda: ff.FMA(score="learned", kv_heads=2, width=D).score_loss(q(), q(B, G, T, D), queries=0),
        ValueError,
        "score_loss needs queries of at least 1, got 0",
    ),
    "groups opened by a number in quotes, later": (
        lambda: later(open="4"),
        ValueError,
        "fma: open must be a whole number, got '4'",
    ),
    "a beam that is no whole number, later": (
        lambda: later(beam=2.5),
        ValueError,
        "fma: beam must be a whole number or None, got 2.5",
    ),
    "documents in a list": (
        lambda: ff.FMA()(q(), q(B, G, T, D), q(B, G, T, E), group=[0] * T),
        TypeError,
        "fma: group must be a tensor of document ids, got list",
    ),
    "half a token to go back by": (
        lambda: ff.FMA().extend(*(q(1, 1, 3, D),) * 3)[1].crop(0.5),
        ValueError,
        "FMAState: cannot drop 0.5 of 3 tokens",
    ),
    "a ring of what is no state": (
        lambda: ff.FMA().ring(None),
        TypeError,
        "fma: goes on from a state of its own, FMAState, got NoneType",
    ),
    "a ring with a rotation that is none": (
        lambda: ff.FMA().ring(ff.FMA().extend(*(q(1, 1, 3, D),) * 3)[1], rotary=10_000),
        TypeError,
        "fma: rotary must be a function of x and position, got int",
    ),
    "extending what is not causal": (
        lambda: mechanism("fma", causal=False).extend(q(), q(B, G, T, D), q(B, G, T, E)),
        NotImplementedError,
        "causal",
    ),
    "attention with a mask": (
        lambda: sdpa("fma", torch.ones(T, T).bool(), enable_gqa=True),
        NotImplementedError,
        "fma cannot honour attn_mask.*group=",
    ),
    "attention of nothing": (
        lambda: ff.attention(None, q(), q()),
        TypeError,
        "attention: query must be a tensor, got NoneType",
    ),
    "attention with a class": (
        lambda: sdpa(ff.FMA, is_causal=True, enable_gqa=True),
        TypeError,
        r"mechanism must be a name or a built Mechanism, such as FMA\(\), got <class",
    ),
    "attention with dropout": (
        lambda: sdpa("window", dropout_p=0.1, enable_gqa=True),
        NotImplementedError,
        "window has no dropout, got dropout_p=0.1",
    ),
    "attention with fewer key heads": (
        lambda: sdpa("fma"),
        ValueError,
        "4 query heads and 2 key heads need enable_gqa=True",
    ),
    "attention causal two ways": (
        lambda: sdpa(ff.FMA(causal=False), is_causal=True, enable_gqa=True),
        ValueError,
        "is_causal=True, but this fma was built with causal=False",
    ),
    "attention scaled two ways": (
        lambda: sdpa(ff.FMA(scale=0.5), is_causal=True, scale=0.1, enable_gqa=True),
        ValueError,
        "scale=0.1, but this fma was built with scale=0.5",
    ),
}


@pytest.mark.parametrize("what", ATTEND | OPERATIONS | {f"mechanism: {k}": v for k, v in MECHANISMS.items()})
def test_refusals(what):
    table = MECHANISMS if what.startswith("mechanism: ") else ATTEND | OPERATIONS
    wrong, kind, message = table[what.removeprefix("mechanism: ")]
    with pytest.raises(kind, match=message):
        wrong()


BOUNDED = {
    "fma": {"block": 4, "near": 4, "rank": 2},
    "window": {"width": 5, "sinks": 1},
    "near-field": {"block": 4, "near": 4},
    "hip": {"keep": 4, "sinks": 1, "width": 4, "q_block": 4, "k_block": 2, "q_stride": 1, "k_stride": 1},
}


KINDS = {"int": ("4", 1.5, True, None), "float": ("4", float("nan"), True), "bool": ("4", 1, None), "str": (4, True)}


@pytest.mark.parametrize("name", ff.mechanisms.names())
def test_an_option_of_another_kind_is_refused_by_its_name(name):
    kind = ff.mechanisms.get(name)
    for option, told in inspect.signature(kind).parameters.items():
        if option == "pool":  # a Pool too, and checked where it is made
            continue
        allowed = getattr(told.annotation, "__name__", str(told.annotation)).split(" | ")
        wrong = [x for x in KINDS[allowed[0]] if set(allowed) == {allowed[0]} or type(x) is str]
        for value in wrong:
            with pytest.raises(ValueError, match=f"{name}: {option} must be .*, got {re.escape(repr(value))}"):
                kind(**{option: value})


@pytest.mark.parametrize("name", [n for n in ff.mechanisms.names() if ff.mechanisms.get(n).supports.decode])
def test_a_state_of_another_batch_is_refused_before_anything_reads_it(name):
    """By the mechanism itself: kernels take shapes on trust."""
    mech = mechanism(name)
    _, state = mech.extend(*(q(2, 2, 9, D) for _ in range(3)))
    with pytest.raises(ValueError, match=f"{name}: the state holds (2 sequences|keys)"):
        mech.extend(*(q(1, 2, 9, D) for _ in range(3)), state)


SCORED = {"moba": {"block": 4}, "ssa": {"block": 4}}
DECODED = [n for n in ff.mechanisms.names() if ff.mechanisms.get(n).decodes != (object,)]


def ring_of(mech):
    return mech.ring(mech.extend(*(q(1, 2, 9, D) for _ in range(3)))[1], capacity=20)


@pytest.mark.parametrize("name", DECODED)
def test_a_ring_of_another_mechanism_is_refused(name):
    mech, token = mechanism(name, **SCORED.get(name, {})), [q(1, 2, 1, D)] * 3
    mech.step(*token, ring_of(mech))
    # what holds all tokens and nothing else is the same for whoever reads them
    whole = {"full", "power-attention", "s2-attention"}
    for other in DECODED:
        if other == name or {name, other} <= whole or (name in whole and other in SCORED) or {name, other} == {*SCORED}:
            continue
        theirs = ring_of(mechanism(other, **SCORED.get(other, {})))
        with pytest.raises((TypeError, ValueError), match=f"{name}: (steps a ring of its|the ring was made for|goes)"):
            mech.step(*token, theirs)
    with pytest.raises(TypeError, match=f"{name}: steps a ring of its own, made by ring\\(\\), got NoneType"):
        mech.step(*token, None)


RESIZED = {
    "window": ({"width": 5}, {"width": 6}),
    "near-field": ({"block": 4, "near": 4}, {"block": 4, "near": 8}),
    "moba": ({"block": 4}, {"block": 8}),
    "fma": ({"block": 4, "near": 4, "rank": 2, "open": 2}, {"block": 4, "near": 4, "rank": 2, "open": 3}),
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_ring_of_other_options_is_refused(name):
    one, other = (mechanism(name, **options) for options in RESIZED[name])
    with pytest.raises(ValueError, match=f"{name}: the ring was made for .*, not for .*; make it by ring"):
        other.step(*([q(1, 2, 1, D)] * 3), ring_of(one))


@pytest.mark.parametrize("name", BOUNDED)
def test_going_back_twice_beyond_rewind_says_what_rewind_counts(name):
    mech = mechanism(name, **BOUNDED[name], rewind=6)
    _, state = mech.extend(*(q(1, 2, 50, D) for _ in range(3)))
    once = state.crop(6)
    with pytest.raises(
        ValueError, match=r"cannot drop 30 of 44 tokens.*rewind=30 or more; it counts from where extend"
    ):
        once.crop(30)
    for drop in (-1, 45):
        with pytest.raises(ValueError, match=f"cannot drop {drop} of 44 tokens$"):
            once.crop(drop)


def test_what_is_right_goes_through():
    """The helpers of the table make valid calls: only the one change is refused."""
    assert attend().out.shape == (B, H, T, E)
    assert scan()[0].shape == (B, H, T, E)
    assert call().shape == (B, H, T, E)
    assert call("fma", block=4, near=4, rank=2).shape == (B, H, T, E)
    assert sdpa("fma", enable_gqa=True).shape == (B, H, T, E)


@pytest.mark.parametrize("name", ["fma", "full"])
def test_a_compiler_follows_attention_by_name(name):
    torch._dynamo.reset()
    x = q(1, 2, 150, 8)
    compiled = torch.compile(
        lambda x: ff.attention(x, x, x, name, is_causal=True, scale=0.3), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), ff.mechanisms.make(name, scale=0.3)(x, x, x))


def test_whole_numbers_of_numpy_are_whole_numbers():
    np = pytest.importorskip("numpy")
    x = [torch.randn(1, 1, 40, 8) for _ in range(3)]
    out, state = ff.FMA(block=np.int64(8), near=np.int32(16), rank=np.int64(2)).extend(*x)
    assert torch.equal(out, ff.FMA(block=8, near=16, rank=2)(*x))
    assert state.crop(np.int64(2)).tokens == 38
