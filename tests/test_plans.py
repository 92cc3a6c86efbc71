"""Calls of attend that come again: checked once, every launch recorded, nothing kept for long."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import farfield as ff
from farfield.kernels import plans, replay
from farfield.ops import attend as op
from farfield.ops.attend import Call, Plan
from farfield.ops.known import Known, Memory
from farfield.testing import compiled, oracles
from farfield.testing.units import assert_within


def inputs(tokens=40, rows=12, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, tokens, 16, generator=gen) for heads in (4, 2, 2))
    far = ff.Rows(k[:, :, :rows], v[:, :, :rows], bias=torch.randn(2, 1, rows, generator=gen))
    sources = [
        (ff.Rows(k, v), ff.select.window(tokens=tokens, width=9, block=8)),
        (far, ff.select.full(tokens=tokens, rows=rows, q_block=8, k_block=4)),
    ]
    return q, sources


def wide(q, sources):
    """The same in float64."""
    found = []
    for rows, layout in sources:
        bias = None if rows.bias is None else rows.bias.double()
        found.append((ff.Rows(rows.k.double(), rows.v.double(), bias=bias), layout))
    return q.double(), found


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.setattr(op, "_memory", Memory(8))
    with mock.patch.object(op, "_check", wraps=op._check) as checks:
        yield checks


def test_what_was_checked_once_is_not_checked_again(checks):
    for seed in range(3):
        q, sources = inputs(seed=seed)
        found = ff.attend(q, sources)
        assert checks.call_count == 1
        assert_within(found.out, oracles.attend(*wide(q, sources))[0], terms=52)


def test_any_change_is_checked_and_refused_as_at_first(checks):
    q, (near, far) = inputs()
    for _ in range(2):
        ff.attend(q, [near, far])
    rows, layout = far
    short = inputs(tokens=39)
    integer = ff.Rows(rows.k, rows.v, bias=torch.zeros(2, 1, 12, dtype=torch.int32))
    bucket = ff.Rows(rows.k, rows.v, bias=rows.bias, group=torch.zeros(12, dtype=torch.int32))
    wrong = (
        (short[0], [near, far], {}), (q.double(), [near, far], {}), (q, [near, short[1][1]], {}),
        (q, [near, (rows, near[1])], {}), (q, [near, (integer, layout)], {}), (q, [near, (bucket, layout)], {}),
        (q, [near, far], {"position": torch.zeros(41, dtype=torch.int32)}),
        (q, [near, far], {"position": torch.zeros(40)}), (q, [near, far], {"group": torch.zeros(40).int()}),
        (q, [near, (rows, None)], {}), (q[0], [near, far], {}), (q, [], {}),
        (q, [near, (rows, ff.select.full(tokens=40, rows=12, q_block=4, k_block=4))], {}),
        (q, [near, (rows, layout.to("meta"))], {}),
    )  # fmt: skip
    for given, sources, options in wrong:
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)):
                ff.attend(given, sources, **options)
    # each of these is another call, not a wrong one
    checks.reset_mock()
    for changed in (
        ff.attend(q, [far, near]),
        ff.attend(q, [near, far], scale=1.0),
        ff.attend(q.mT.clone().mT, [near]),
    ):
        assert changed.out.isfinite().all()
    assert checks.call_count == 3


def test_signatures_are_bounded(checks):
    for tokens in range(20, 50):
        q, sources = inputs(tokens)
        ff.attend(q, sources)
        assert len(op._memory.known) <= 8


def test_a_compiler_sees_none_of_it(monkeypatch):
    monkeypatch.setattr(op, "_memory", Memory(8))
    q, sources = inputs()
    torch._dynamo.reset()
    traced = torch.compile(lambda q: ff.attend(q, sources).out, backend="eager", fullgraph=True)
    for _ in range(3):
        assert_within(traced(q), oracles.attend(*wide(q, sources))[0], terms=52)
    assert not op._memory.known


def test_a_call_is_recorded_when_it_comes_again(monkeypatch):
    made = []

    class Recorded:
        def __init__(self, function, *options):
            self.function, self.options = function, options
            made.append(function)

        def __call__(self, *inputs):
            return self.function(*inputs, *self.options)

    def refuses(x, more):
        if len(made) == 2 and not refused:
            refused.append(1)
            raise replay.Refused("cannot be recorded")
        return x + more

    refused, known = [], Known()
    monkeypatch.setattr(plans, "Recorded", Recorded)
    monkeypatch.setattr(plans, "_on_gpu", lambda x: True)
    for turn in range(3):
        assert plans.run(known, lambda x, more: x + more, (torch.tensor(turn),), 1) == turn + 1
        assert len(made) == min(turn, 1)
    known = Known()
    for turn in range(4):
        assert plans.run(known, refuses, (torch.tensor(turn),), 1) == turn + 1
    assert refused
    assert len(made) == 2
    assert not isinstance(known.run, Recorded)


def call(tokens, *, k_block=64, far_block=4, two=True, bias=True, width=64, dtype=torch.bfloat16, positions=False):
    """A causal call of whole blocks, and gathered rows beside them."""
    q, k, v = (torch.zeros(1, h, tokens, width, dtype=dtype) for h in (4, 2, 2))
    none, blocks = q.new_empty(0), tokens // k_block
    near = torch.zeros(1, 1, blocks, 3, dtype=torch.int32), torch.ones(1, 1, blocks, dtype=torch.int32)
    rows = tokens // 8
    far = torch.zeros(1, 4, blocks, 5, dtype=torch.int32), torch.ones(1, 4, blocks, dtype=torch.int32)
    n = 2 if two else 1
    keys, values = [k, k[:, :, :rows].clone()][:n], [v, v[:, :, :rows].clone()][:n]
    weights = [none, torch.zeros(1, 1, rows) if bias else none][:n]
    position = torch.zeros(1, 1, tokens, dtype=torch.int32) if positions else none
    index, count = ([x, y][:n] for x, y in zip(near, far, strict=True))
    listed = [Plan(k_block, k_block, 1, -1, 0), Plan(k_block, far_block, 0, -1, 0)][:n]
    return Call(q, keys, values, weights, [none] * n, [none] * n, position, none, index, count, listed, 0.125)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")
@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        (
            {},
            {
                "attend_hopper",
                "_mark",
                "attend_backward_queries",
                "attend_backward_rows_hopper",
                "sum_shares",
            },
        ),
        (
            {"two": False, "positions": True, "k_block": 128},
            {"attend_hopper", "_mark", "attend_backward_queries_hopper", "attend_backward_rows_hopper", "clear"},
        ),
        (
            {"dtype": torch.float32, "width": 16},
            {"attend_forward", "_mark", "attend_backward_queries", "attend_backward_rows", "sum_shares"},
        ),
        ({}, {"attend_hopper", "_keys", "_spans", "attend_backward_queries", "sum_shares"}),
    ],
    # the order of a set differs from process to process
    ids=["two-sources", "positions", "float32", "sorted"],
)
def test_every_launch_is_recorded(options, kernels, monkeypatch):
    """A launch that goes past `start` would be missing in every replay."""
    if "_keys" in kernels:
        monkeypatch.setattr(plans.attend_backward.transpose, "MASKS", 0)
    given = call(512, **options)
    tensors, numbers = plans._parts(given)
    d_out, lse = torch.zeros_like(given.q), torch.zeros(given.q.shape[:3])
    with compiled.recording() as launches:
        _, forward = replay.record(plans._forward, tensors, (numbers,))
        recordings, own = [forward], [d_out, torch.zeros_like(d_out), lse]
        if not plans.attend_backward.counts(given):
            keys, first = replay.record(plans._keys, tensors, (numbers,))
            recordings.append(first)
            own += keys.zero_().sort(stable=True)
        own.append(torch.zeros_like(lse))
        recordings.append(replay.record(plans._gradients, [*own, *tensors], (numbers, len(own), True))[1])
    kept = [x.kernel.metadata.name for recording in recordings for x in recording.launches]
    assert sorted(kept) == sorted(launch.name for launch in launches)
    assert kernels <= set(kept)


def test_calls_that_sort_in_between_are_not_recorded(monkeypatch):
    """A query's own lists may go through in chunks; nothing of an empty call is launched."""
    given = call(512, two=False)
    assert plans._takes(given)
    index, count = torch.zeros(1, 2, 512, 3).int(), torch.zeros(1, 2, 512).int()
    own = given._replace(index=[index], count=[count], plans=[Plan(1, 64, 1, -1, 0)])
    assert plans._takes(own)
    # less memory than all parts take
    monkeypatch.setattr(plans.attend_listed, "PARTS", 1)
    assert not plans._takes(own)
    assert not plans._takes(given._replace(q=given.q[:0]))
    long = torch.empty(1, 1, plans.LONGEST + 1, 1, dtype=torch.int32)
    assert not plans._takes(given._replace(index=[long]))


def test_a_call_is_put_together_again():
    given = call(512, positions=False)
    tensors, numbers = plans._parts(given)
    again = plans._call(tensors, numbers)
    for a, b in zip(given, again, strict=True):
        for x, y in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (a, b)), strict=True):
            if isinstance(x, torch.Tensor):
                assert x is y or x.numel() == y.numel() == 0
            else:
                assert x == y
