"""attend against the dense float64 oracle: random layouts, every kind of visibility, gradients, memory, the op."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from farfield.ops.attend import attend
from farfield.select import static
from farfield.testing import oracles
from farfield.testing.contract import poisoned_memory
from farfield.testing.inputs import normal
from farfield.testing.largest import Largest
from farfield.testing.units import assert_within
from farfield.types import Layout, Rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GARBAGE = 2**30  # what stands in a list past its count


def random_layout(
    seed, *, tokens, rows, q_block, k_block, batch=1, heads=1, fill=0.5, causal=False, reach=None, sinks=0
):
    """Random ascending lists, some of them empty, with garbage past their ends."""
    gen = torch.Generator().manual_seed(seed)
    blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
    picked = torch.rand(batch, heads, blocks, row_blocks, generator=gen) < fill
    picked &= torch.rand(batch, heads, blocks, 1, generator=gen) > 0.15
    index = torch.arange(row_blocks).expand_as(picked).masked_fill(~picked, GARBAGE).sort(-1).values
    count = picked.sum(-1)
    return Layout(index.int(), count.int(), q_block, k_block, tokens, rows, causal, reach, sinks)


@dataclasses.dataclass
class Problem:
    """One call of attend, with float64 leaves."""

    q: torch.Tensor
    sources: list[tuple[Rows, Layout]]
    options: dict

    def leaves(self, dtype=torch.float64, of=lambda x: x):
        """The same problem with leaves in this dtype (biases float32 or wider), and the leaves by name."""
        wide = torch.promote_types(dtype, torch.float32)
        found = {"q": of(self.q.detach().to(dtype)).requires_grad_()}
        sources = []
        for n, (rows, layout) in enumerate(self.sources):
            found[f"k{n}"] = of(rows.k.detach().to(dtype)).requires_grad_()
            found[f"v{n}"] = of(rows.v.detach().to(dtype)).requires_grad_()
            if rows.bias is not None:
                found[f"bias{n}"] = rows.bias.detach().to(wide).requires_grad_()
            sources.append(
                (dataclasses.replace(rows, k=found[f"k{n}"], v=found[f"v{n}"], bias=found.get(f"bias{n}")), layout)
            )
        return found, sources

    @property
    def terms(self):
        return max(sum(len(rows) for rows, _ in self.sources), self.q.shape[1] * self.q.shape[2], 1)

    def run(self, f, dtype=torch.float64, of=lambda x: x):
        """out, lse and all gradients, those through lse included."""
        leaves, sources = self.leaves(dtype, of)
        out, lse = f(leaves["q"], sources, **self.options)
        d_out, d_lse = normal(*out.shape, seed=91, dtype=out.dtype), normal(*lse.shape, seed=92, dtype=lse.dtype)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (d_out, d_lse))
        return {"out": out, "lse": lse} | {f"d {n}": g for n, g in zip(leaves, grads, strict=True)}

    def check(self, dtype=torch.float64, of=lambda x: x, names=None, units=3.0):
        exact, got = self.run(oracles.attend), self.run(partial(), dtype, of)
        assert got["out"].dtype == dtype
        assert got["lse"].dtype == torch.promote_types(dtype, torch.float32)
        for name in names or exact:
            # a bias gradient is float32 like the bias, but made from an `out` of the low precision
            x = got[name].to(dtype) if name.startswith("d bias") else got[name]
            assert_within(x, exact[name], terms=self.terms, units=units, name=name)
        return got


def partial():
    """attend with the oracle's signature."""

    def run(q, sources, **options):
        result = attend(q, sources, **options)
        return result.out, result.lse

    return run


@st.composite
def problems(draw):
    integers, booleans, pick = (functools.partial(f) for f in (st.integers, st.booleans, st.sampled_from))
    B, G, R = draw(integers(1, 2)), draw(integers(1, 2)), draw(integers(1, 3))
    T, D, E, q_block = draw(integers(1, 30)), draw(pick([1, 4, 7])), draw(pick([1, 4, 6])), draw(pick([1, 3, 8, 40]))
    H, seed = G * R, draw(integers(0, 10**6))
    gen = torch.Generator().manual_seed(seed)

    def per_head(n, low, high, heads):
        shape = draw(pick([(n,), (1, 1, n), (B, 1, n), (1, heads, n), (B, heads, n)]))
        return torch.randint(low, high, shape, generator=gen)

    options = {}
    if draw(booleans()):
        options["position"] = per_head(T, -2, 40, H)
    grouped = draw(booleans())
    if grouped:
        options["group"] = per_head(T, -1, 3, H)
    if draw(booleans()):
        options["scale"] = draw(pick([0.25, 1.0, 2.0]))
    sources = []
    count = draw(integers(1, 3))
    for n in range(count):
        S = draw(integers(1, 30))
        rows = {"k": normal(B, G, S, D, seed=seed + 10 * n + 1), "v": normal(B, G, S, E, seed=seed + 10 * n + 2)}
        if draw(booleans()):
            rows["end"] = per_head(S, 0, 40, G)
        if grouped and (draw(booleans()) or n == count - 1):
            rows["group"] = per_head(S, -1, 3, G)
        if draw(booleans()):
            shape = draw(pick([(S,), (1, 1, S), (B, 1, S), (1, G, S), (B, G, S), (1, H, S), (B, H, S)]))
            bias = normal(*shape, seed=seed + 10 * n + 3)
            if draw(booleans()):
                bias = bias.masked_fill(torch.rand(shape, generator=gen) < 0.2, float("-inf"))
            rows["bias"] = bias
        reach = draw(pick([None, 1, 6, 17]))
        layout = random_layout(
            seed + n, tokens=T, rows=S, q_block=q_block, k_block=draw(pick([1, 2, 8, 40])),
            batch=draw(pick([1, B])), heads=draw(pick([1, H])), fill=draw(pick([0.0, 0.3, 0.8, 1.0])),
            causal=draw(booleans()), reach=reach, sinks=0 if reach is None else draw(integers(0, 3)),
        )  # fmt: skip
        sources.append((Rows(**rows), layout))
    return Problem(normal(B, H, T, D, seed=seed), sources, options)


def problem(**changes):
    """A fixed problem that has everything in it: two sources, groups, positions, bias, short blocks, per-head lists."""
    B, H, G, T, D, E = 2, 4, 2, 37, 8, 5
    gen = torch.Generator().manual_seed(3)
    near = Rows(normal(B, G, T, D, seed=1), normal(B, G, T, E, seed=2), group=torch.arange(T) // 20)
    far = Rows(
        normal(B, G, 23, D, seed=4),
        normal(B, G, 23, E, seed=5),
        end=torch.randint(0, T, (B, G, 23), generator=gen),
        bias=normal(1, H, 23, seed=6),
    )
    sources = [
        (near, static.window(tokens=T, width=11, sinks=2, block=8)),
        (far, random_layout(7, tokens=T, rows=23, q_block=8, k_block=4, batch=B, heads=H, causal=True)),
    ]
    return Problem(normal(B, H, T, D), sources, {"group": torch.arange(T) // 20} | changes)


@given(problems(), st.sampled_from(DTYPES))
def test_random_problems(problem, dtype):
    # Sizes go down to one element, where sums may cancel and no rms is an average: three units are for the fixed
    # problems. A row too few or too many is 1e4 units in float32. Low precision rounds `out`, and a gradient that
    # cancels to nothing is nothing but that.
    problem.check(dtype, names=None if dtype in (torch.float32, torch.float64) else ("out", "lse"), units=300.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(dtype):
    problem().check(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_full_layout_is_full_attention(dtype, causal):
    q, k, v = normal(2, 4, 70, 16), normal(2, 2, 70, 16, seed=1), normal(2, 2, 70, 16, seed=2)
    want, want_lse = oracles.full(q, k, v, causal=causal)
    layout = static.full(tokens=70, causal=causal, q_block=16, k_block=32)
    got = attend(q.to(dtype), Rows(k.to(dtype), v.to(dtype)), layout)
    assert_within(got.out, want, terms=70)
    assert_within(got.lse, want_lse, terms=70, name="lse")


def test_the_dense_mask_of_the_docstring():
    """One literal example, by hand: 5 queries in blocks of 2, 6 rows in blocks of 3."""
    index = torch.tensor([[[[0, GARBAGE], [0, 1], [1, GARBAGE]]]], dtype=torch.int32)
    layout = Layout(index, torch.tensor([[[1, 2, 1]]], dtype=torch.int32), 2, 3, 5, 6, causal=True)
    want = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert oracles.visible(layout)[0, 0].int().tolist() == want
    # every row is told apart by its own value
    out = attend(torch.zeros(1, 1, 5, 2), Rows(torch.zeros(1, 1, 6, 2), torch.eye(6)[None, None]), layout).out
    assert (out[0, 0] > 0).int().tolist() == want


def test_positions_in_any_order():
    gen = torch.Generator().manual_seed(5)
    for shape in ((37,), (2, 1, 37), (2, 4, 37)):
        problem(position=torch.randint(0, 37, shape, generator=gen)).check(torch.float32)
        problem(position=torch.arange(36, -1, -1).expand(shape)).check(torch.float32)


def test_queries_that_read_nothing_give_zero_minus_infinity_and_no_gradient():
    p = problem()
    p.options["group"] = p.options["group"].clone()
    p.options["group"][5:9] = 99  # no row is in it
    # the far rows have no group: hide them from everyone
    far, layout = p.sources[1]
    p.sources[1] = dataclasses.replace(far, bias=torch.full((23,), float("-inf"), dtype=torch.float64)), layout
    for dtype in DTYPES:
        got = p.check(dtype)
        assert (got["out"][:, :, 5:9] == 0).all()
        assert (got["lse"][:, :, 5:9] == float("-inf")).all()
        assert (got["d q"][:, :, 5:9] == 0).all()
        assert (got["d k1"] == 0).all()
        assert (got["d bias1"] == 0).all()


def test_empty_lists_no_rows_and_empty_batches():
    q, k, v = normal(2, 4, 9, 3), normal(2, 2, 7, 3, seed=1), normal(2, 2, 7, 5, seed=2)
    nothing = Layout(torch.zeros(1, 1, 3, 0, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int32), 4, 2, 9, 7)
    Problem(q, [(Rows(k, v), nothing)], {}).check(torch.float32)
    none_used = dataclasses.replace(nothing, index=torch.full((1, 1, 3, 2), GARBAGE, dtype=torch.int32))
    Problem(q, [(Rows(k, v), none_used)], {}).check(torch.float32)
    full = static.full(tokens=9, rows=7, q_block=4, k_block=2)
    Problem(q, [(Rows(k, v), nothing), (Rows(k, v), full)], {}).check(torch.float32)
    no_rows = dataclasses.replace(nothing, rows=0)
    Problem(q, [(Rows(k[:, :, :0], v[:, :, :0]), no_rows)], {}).check(torch.float32)
    Problem(q, [(Rows(k[:, :, :0], v[:, :, :0]), no_rows), (Rows(k, v), full)], {}).check(torch.float32)
    got = Problem(q[:0], [(Rows(k[:0], v[:0]), full)], {}).run(partial())
    assert got["out"].shape == (0, 4, 9, 5)
    assert got["lse"].shape == (0, 4, 9)


def test_huge_logits_neither_overflow_nor_vanish():
    p = problem(scale=1000.0)
    for name, x in p.run(partial(), torch.float32).items():
        assert x[x != float("-inf")].isfinite().all(), name
    p = problem()
    far, layout = p.sources[1]
    p.sources[1] = dataclasses.replace(far, bias=far.bias + 1e4), layout
    for name, x in p.run(partial(), torch.float32).items():
        assert x[x != float("-inf")].isfinite().all(), name
    # so far below the others that its weights are 0
    p.sources[1] = dataclasses.replace(far, bias=far.bias - 1e4), layout
    p.check(torch.float32)


@pytest.mark.parametrize("step", [1, 700, 5000])
def test_the_size_of_a_step_changes_nothing(monkeypatch, step):
    from farfield.cpu import attend as cpu

    monkeypatch.setattr(cpu, "STEP", step)
    problem().check(torch.float32)


def test_poisoned_lists_and_memory_are_never_read():
    with poisoned_memory():
        again = problem().check(torch.float32)
    for name, x in problem().run(partial(), torch.float32).items():
        assert torch.equal(x, again[name]), name


def test_repeats_bit_for_bit():
    first = problem().run(partial(), torch.float32)
    for _ in range(5):
        for name, x in problem().run(partial(), torch.float32).items():
            assert torch.equal(x, first[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(dtype):
    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def inside(x):
        B, H, T, D = x.shape
        buffer = x.new_full((B + 1, H + 1, T + 2, D + 3), float("nan"))
        buffer[1:, :-1, 1:-1, 2:-1] = x
        return buffer[1:, :-1, 1:-1, 2:-1]

    for of in (transposed, inside):
        problem().check(dtype, of)


def test_an_expanded_gradient_and_expanded_inputs():
    p = problem()
    leaves, sources = p.leaves(torch.float32)
    exact_leaves, exact_sources = p.leaves()
    got = torch.autograd.grad(attend(leaves["q"], sources, **p.options).out.sum(), list(leaves.values()))
    want = torch.autograd.grad(
        oracles.attend(exact_leaves["q"], exact_sources, **p.options)[0].sum(), list(exact_leaves.values())
    )
    for name, a, b in zip(leaves, got, want, strict=True):
        assert_within(a, b, terms=p.terms, name=f"d {name}")
    one = [normal(1, h, 20, 4, seed=h) for h in (4, 2, 2)]
    layout = static.window(tokens=20, width=5, block=4)
    q, k, v = (x.float().expand(3, -1, -1, -1) for x in one)
    want_out, _ = oracles.attend(one[0], [(Rows(*one[1:]), layout)])
    assert_within(attend(q, Rows(k, v), layout).out, want_out.expand(3, -1, -1, -1), terms=20)


def test_only_what_needs_a_gradient_gets_one():
    for wanted in ("q", "k0", "v0", "bias1"):
        p = problem()
        leaves, sources = p.leaves(torch.float32)
        for name, x in leaves.items():
            x.requires_grad_(name == wanted)
        exact = p.run(oracles.attend)
        out, lse = partial()(leaves["q"], sources, **p.options)
        d_out, d_lse = normal(*out.shape, seed=91, dtype=out.dtype), normal(*lse.shape, seed=92, dtype=lse.dtype)
        (grad,) = torch.autograd.grad((out, lse), leaves[wanted], (d_out, d_lse))
        assert_within(grad, exact[f"d {wanted}"], terms=p.terms, name=wanted)


def test_a_gradient_through_out_alone_or_lse_alone():
    for which in (0, 1):
        p = problem()
        leaves, sources = p.leaves(torch.float32)
        exact, exact_sources = p.leaves()
        result = partial()(leaves["q"], sources, **p.options)[which]
        want = oracles.attend(exact["q"], exact_sources, **p.options)[which]
        finite = want.isfinite()
        got = torch.autograd.grad(result[finite].sum(), list(leaves.values()), allow_unused=True)
        wants = torch.autograd.grad(want[finite].sum(), list(exact.values()), allow_unused=True)
        for name, a, b in zip(leaves, got, wants, strict=True):
            a, b = (torch.zeros_like(leaves[name]) if x is None else x for x in (a, b))
            assert_within(a, b.double(), terms=p.terms, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_row_has_no_logit_gradient(dtype):
    """The softmax of one logit is 1 whatever it is: d_out . v and d_out . out cancel to the last bit."""
    q, k, v = (
        normal(1, 1, 64, 3, dtype=dtype),
        normal(1, 1, 64, 3, seed=1, dtype=dtype),
        normal(1, 1, 64, 1, seed=2, dtype=dtype),
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, Rows(k, v), static.window(tokens=64, width=1, block=8)).out
    assert torch.equal(out, v)
    d_out = normal(*out.shape, seed=3, dtype=dtype)
    d_q, d_k, d_v = torch.autograd.grad(out, leaves, d_out)
    assert (d_q == 0).all()
    assert (d_k == 0).all()
    assert torch.equal(d_v, d_out)


def test_gradcheck():
    B, H, G, T, D, E = 1, 2, 1, 5, 2, 3
    near, far = (
        static.window(tokens=T, width=3, block=2),
        random_layout(1, tokens=T, rows=4, q_block=2, k_block=2, fill=0.9),
    )
    x = [
        normal(B, H, T, D), normal(B, G, T, D, seed=1), normal(B, G, T, E, seed=2),
        normal(B, G, 4, D, seed=3), normal(B, G, 4, E, seed=4), normal(B, H, 4, seed=5),
    ]  # fmt: skip

    def call(q, k, v, far_k, far_v, bias):
        result = attend(q, [(Rows(k, v), near), (Rows(far_k, far_v, bias=bias), far)])
        return result.out, result.lse

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in x])


@pytest.mark.parametrize(
    ("transposed", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)], ids=str
)
def test_opcheck(transposed, dtype):
    p = problem()
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.farfield.attend.default:
                calls.append(args)
            return func(*args, **(kwargs or {}))

    def of(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x

    leaves, sources = p.leaves(dtype, of)
    with Record():
        attend(leaves["q"], sources, **p.options)
    (args,) = calls
    torch.library.opcheck(torch.ops.farfield.attend.default, _with_gradients(args))


def _with_gradients(args):
    """The recorded arguments with floating point tensors as leaves."""

    def leaf(x):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.detach().requires_grad_()
        return [leaf(y) for y in x] if isinstance(x, list | tuple) and x and isinstance(x[0], torch.Tensor) else x

    return tuple(leaf(a) for a in args)


def test_registered_and_direct_calls_agree():
    """A dispatch mode sees the registered operation; without one it is not called. The numbers are the same."""
    p = problem()
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "farfield":
                calls.append(func)
            return func(*args, **(kwargs or {}))

    direct = p.run(partial(), torch.float32)
    with Watch():
        registered = p.run(partial(), torch.float32)
    assert calls == [torch.ops.farfield.attend.default, torch.ops.farfield.attend_backward.default]
    for name in direct:
        assert torch.equal(direct[name], registered[name]), name


@pytest.mark.parametrize("registered", [False, True])
def test_second_derivatives_are_refused(registered):
    p = problem()
    leaves, sources = p.leaves(torch.float32)
    with Largest() if registered else contextlib.nullcontext():
        out = attend(leaves["q"], sources, **p.options).out
        (grad,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            grad.sum().backward()


def test_compiles_whole():
    torch._dynamo.reset()
    p = problem()
    exact = p.run(oracles.attend)
    got = p.run(torch.compile(partial(), fullgraph=True, backend="aot_eager"), torch.float32)
    for name in exact:
        assert_within(got[name], exact[name], terms=p.terms, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Sums stay in float32, and float32 stays float32, wherever the call stands."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem().check(dtype)


def test_makes_nothing_of_the_size_of_the_score_matrix(monkeypatch):
    from farfield.cpu import attend as cpu
    from farfield.ops.attend import Call, Plan

    monkeypatch.setattr(cpu, "STEP", 1 << 14)

    def largest(T):
        q, k, v = (normal(1, 2, T, 8, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
        layout = static.full(tokens=T, causal=True, q_block=32, k_block=32)
        # the op itself is opaque to the mode: look inside
        watch = Largest()
        with watch:
            none, plan = q.new_empty(0), Plan(32, 32, causal=True, reach=-1, sinks=0)
            given = [k], [v], [none], [none], [none], none, none, [layout.index], [layout.count], [plan]
            call = Call(q.detach(), *given, scale=1.0)
            out, lse = cpu.forward(call)
            cpu.backward(call, torch.ones_like(out), torch.ones_like(lse), out, lse, True)
        return watch.elements

    small, large = largest(512), largest(2048)
    assert large <= 4.2 * small
    assert large < 2048 * 2048 / 4


def test_scale_and_bias_are_logits():
    """scale multiplies q . k only; the bias comes on top, and lse is a natural logarithm."""
    q, k, v = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 2), torch.tensor([[[[1.0], [2.0], [4.0]]]])
    layout = static.full(tokens=1, rows=3)
    bias = torch.tensor([0.0, 1.0, 2.0])
    got = attend(q, Rows(k, v, bias=bias.log()), layout, scale=3.0)
    assert_within(got.lse, torch.tensor([[[6.0 + torch.log(torch.tensor(3.0)).item()]]]).double(), terms=3, units=20.0)
    assert_within(got.out, torch.tensor([[[[10 / 3]]]]).double(), terms=3, units=20.0)
