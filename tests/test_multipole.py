"""multipole without a GPU: sizes, what it takes, what a compiler sees of it, one kernel for all lengths."""

import os
from functools import partial
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import farfield as ff
from farfield.kernels import multipole as km
from farfield.kernels import replay
from farfield.ops import multipole as op
from farfield.ops.multipole import LEVELS, Field, kept_parts, reached, refusal, tree_of
from farfield.testing import compiled

FIELDS = (Field(64, 64, 4, 0), Field(64, 128, 16, 5), Field(128, 384, 32, 128), Field(64, 64, 1, 3))


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_what_is_kept_has_room_for_every_length(field):
    first = field.near + field.block + 1
    for tokens in (*range(first, first + 700, 37), 9999, 65_536, 65_537, 1_000_003):
        q, k = torch.Size((2, 8, tokens, 64)), torch.Size((2, 4, tokens, 64))
        tree = tree_of(tokens, field)
        far_k, far_v, bias, end = kept_parts(q, k, 2, field)
        rows = 2 * 4 * 64 * 2 * tree.rows
        assert 4 * 2 * 8 * tokens <= far_k
        assert far_k + rows <= far_v
        assert far_v + rows <= bias
        assert bias + 4 * tree.rows <= end
        assert not any(at % 16 for at in (far_k, far_v, bias))
        # and not for much more
        assert end - 4 * 2 * 8 * tokens < 1.2 * (2 * rows + 4 * tree.rows) + 2 * 64 * 4 * 64 * 2 * 32


def test_levels_end_where_nothing_is_left_to_read():
    """The last query's block and the neighbours of its group on the top level are all there is."""
    for radius in (1, 2, 3, 6):
        for blocks in range(1, 400):
            levels, own = reached(blocks, radius), radius
            for _ in range(levels):
                assert blocks - 1 >> _ > own
                own = (own + 1) // 2
            assert blocks - 1 >> levels <= own


def fake(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(op, "_major", lambda device: 9)
    with FakeTensorMode():
        yield


def test_what_it_takes(hopper):
    def why(*, tokens=1000, width=64, value_width=64, dtype=torch.bfloat16, field=FIELDS[0], scale=None, batch=1):
        q, k = (fake(batch, h, tokens, width, dtype=dtype) for h in (4, 2))
        return refusal(q, k, fake(batch, 2, tokens, value_width, dtype=dtype), field, scale) or "taken"

    assert why() == why(width=128, value_width=128) == why(dtype=torch.float16) == why(scale=0.3) == "taken"
    assert why(tokens=129) == "taken"
    assert "far field" in why(tokens=128)
    assert "far field" in why(batch=0)
    assert "not torch.float32" in why(dtype=torch.float32)
    assert "got 64 and 128" in why(value_width=128)
    assert "got 80" in why(width=80, value_width=80)
    assert "got 32" in why(field=Field(32, 32, 4, 0))
    assert "got 64 and 64" in why(field=Field(64, 64, 64, 0))
    assert "got -1.0" in why(scale=-1.0)
    x = torch.empty(1, 4, 1000, 64, dtype=torch.bfloat16, device="cpu")
    assert "Hopper" in (refusal(x, x, x, FIELDS[0], None) or "")


def test_older_gpus_are_left_to_the_general_kernels(hopper, monkeypatch):
    monkeypatch.setattr(op, "_major", lambda device: 8)
    x = fake(1, 4, 1000, 64)
    assert "Hopper" in (refusal(x, x, x, FIELDS[0], None) or "")


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_fake_tensors_have_the_shapes(hopper, field):
    q, k, v = fake(2, 8, 3000, 64), fake(2, 4, 3000, 64), fake(2, 3000, 4, 64).transpose(1, 2)
    out, kept = torch.ops.farfield.multipole(q, k, v, *field, 0.125)
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
    assert (kept.shape, kept.dtype) == ((kept_parts(q.shape, k.shape, 2, field)[-1],), torch.uint8)
    grads = torch.ops.farfield.multipole_backward(out, q, k, v, out, kept, *field, 0.125)
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert (grad.shape, grad.dtype, grad.is_contiguous()) == (x.shape, x.dtype, True)


@pytest.fixture
def taken(monkeypatch):
    """The operation takes everything, and nothing is computed."""
    monkeypatch.setattr(op, "refusal", lambda *given: None)
    with FakeTensorMode():
        yield [torch.empty(1, heads, 1000, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)]


def test_the_mechanism_chooses_it_by_its_options(taken, monkeypatch):
    calls = []
    monkeypatch.setattr(op, "multipole", lambda q, k, v, field, scale: calls.append((field, scale)))
    ff.FMA()(*taken)
    ff.FMA(block=128, near=256, rank=8, sinks=3, scale=0.3, horizon=1 << 17)(*taken)
    assert calls == [((64, 128, 16, 0, LEVELS), None), ((128, 256, 8, 3, 9), 0.3)]
    for other in (
        ff.FMA(pool="learned", kv_heads=2),
        ff.FMA(pool="softmax", kv_heads=2, width=64),
        ff.FMA(causal=False),
        ff.FMA(causal=False, queries="pooled"),
    ):
        other(*taken)
    ff.FMA()(*taken, rotary=lambda x, position: x)
    assert len(calls) == 2


def test_what_was_checked_once_is_not_checked_again(monkeypatch):
    """Plans are found by everything that the checks look at; any change is checked, and refused, as at first."""
    monkeypatch.setattr(op, "refusal", lambda *given: None)
    monkeypatch.setattr(op, "_plans", {})
    monkeypatch.setattr(km, "_forward", lambda q, k, v, field, scale: (torch.zeros_like(q), torch.empty(0)))
    monkeypatch.setattr(km.Whole, "_recorded", lambda self, f: partial(f, field=self.field, scale=self.scale))
    q, k, v = (torch.zeros(1, heads, 1000, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    mech = ff.FMA()
    with mock.patch.object(mech, "check", wraps=mech.check) as checks:
        mech(q, k, v)
        mech(q, k, v)
        assert checks.call_count == 1
        mech(q[:, :, :999], k[:, :, :999], v[:, :, :999])
        ff.FMA(scale=0.5)(q, k, v)
        assert checks.call_count == 2
        for wrong in ((q, k, v.half()), (q, k[:, :, 1:], v), (q.float(), k, v), (q, k, v.to("meta"))):
            with pytest.raises((TypeError, ValueError, NotImplementedError)):
                mech(*wrong)
    for tokens in range(200, 200 + 2 * op.KEPT):
        mech(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens])
        assert len(op._plans) <= op.KEPT


def test_tensors_that_no_kernel_reads_are_copied(monkeypatch):
    seen = []

    def forward(q, k, v, field, scale):
        seen.append([x.stride() for x in (q, k, v)])
        assert all(x.data_ptr() % 16 == 0 for x in (q, k, v))
        return q + k + v, torch.empty(0)

    monkeypatch.setattr(km, "_forward", forward)
    monkeypatch.setattr(km.Whole, "_recorded", lambda self, f: partial(f, field=self.field, scale=self.scale))
    monkeypatch.setattr(op, "_plans", {})
    shape, gen = (1, 2, 300, 64), torch.Generator().manual_seed(0)
    whole = torch.randn(2 * 300 * 64 + 1, generator=gen).bfloat16()
    dense, shifted = (x.view(shape) for x in (whole[:-1], whole[1:]))
    turned = whole[:-1].view(1, 300, 2, 64).transpose(1, 2)
    gaps = torch.randn(1, 2, 300, 68, generator=gen).bfloat16()[..., :64]
    repeated = torch.randn(1, 1, 300, 64, generator=gen).bfloat16().expand(shape)
    for x, kept in ((dense, True), (turned, True), (shifted, True), (gaps, False), (repeated, False)):
        out = op.multipole(x, dense, x, FIELDS[0])
        assert torch.equal(out, x + dense + x)
        strides = x.stride() if kept else dense.stride()
        assert seen.pop() == [strides, dense.stride(), strides]


def test_gradients_have_the_shapes(taken):
    q, k, v = (x.requires_grad_() for x in taken)
    out = ff.FMA()(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]


def test_second_derivatives_are_refused(taken):
    q, k, v = taken
    q.requires_grad_()
    (grad,) = torch.autograd.grad(ff.FMA()(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), q)


def test_one_graph_for_all_lengths(taken, monkeypatch):
    """Sizes follow from the length without steps: no number of levels is part of a compiled graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: op.multipole(q, k, v, FIELDS[1]), dynamic=True, backend=counter)
    for tokens in (1000, 1500, 9000, 70_000):
        compiled(*(torch.empty(1, heads, tokens, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)))
    assert counter.frame_count == 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")
def test_one_kernel_for_all_lengths():
    found: dict[str, set[str]] = {}
    field = FIELDS[1]
    for tokens in (2500, 40_001):
        q, k, v = (torch.empty(1, h, tokens, 64, dtype=torch.bfloat16, device="meta") for h in (4, 2, 2))
        with compiled.recording() as launches:
            out, kept = km._forward(q, k, v, field, 0.125)
            km._backward(torch.empty_like(out), q, k, v, out, kept, field, 0.125)
        for launch in launches:
            found.setdefault(launch.name, set()).add(launch.hash)
    assert {"pool_forward", "attend_hopper", "pool_backward"} <= found.keys()
    several = {name: len(hashes) for name, hashes in found.items() if len(hashes) > 1}
    assert not several


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")
@pytest.mark.parametrize(
    ("field", "tokens", "heads", "kv_heads", "kernels", "lists"),
    [
        (FIELDS[0], 700, 2, 2, {"multipole_hopper", "multipole_walk"}, set()),
        (Field(128, 128, 16, 0), 700, 2, 2, {"multipole_hopper", "multipole_walk_near", "multipole_walk_far"}, set()),
        (FIELDS[0], 2500, 4, 2, {"multipole_hopper", "attend_backward_queries"}, {"tree_lists", "_keys", "_spans"}),
        (FIELDS[1], 2500, 4, 2, {"attend_hopper", "attend_backward_queries"}, {"tree_lists", "_keys", "_spans"}),
    ],
)
def test_every_launch_is_recorded(field, tokens, heads, kv_heads, kernels, lists):
    """A launch that goes past `start` would be missing in every replay."""
    given, constant = [], replay._Recorder.constant
    q, k, v = (torch.empty(1, h, tokens, 64, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads))
    with compiled.recording() as launches:

        def made_once(recorder, make, options):
            before = len(launches)
            found = constant(recorder, make, options)
            given.extend(launch.name for launch in launches[before:])
            return found

        with mock.patch.object(replay._Recorder, "constant", made_once):
            found, forward = replay.record(km._forward, (q, k, v), (field, 0.125))
            _, backward = replay.record(km._backward, (torch.empty_like(q), q, k, v, *found), (field, 0.125))
    kept = [launch.kernel.metadata.name for launch in (*forward.launches, *backward.launches)]
    assert set(given) == lists
    assert {"pool_forward", "pool_backward", *kernels} <= set(kept)
    assert sorted(launch.name for launch in launches) == sorted(given + kept)
