"""Calls of scan and averages that come again: checked once, every launch recorded, decays made once."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import farfield.ops.scan as op
from farfield.kernels import plans, prefix, replay
from farfield.kernels import scan as kernels
from farfield.mechanisms import lightning_attention
from farfield.mechanisms.lightning_attention import LightningAttention
from farfield.ops.known import Memory
from farfield.ops.scan import Decays, scan
from farfield.testing import compiled, oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")


def inputs(tokens=40, seed=0):
    q, k, v = (normal(2, heads, tokens, 8, seed=seed + i).float() for i, heads in enumerate((4, 2, 2)))
    return q, k, v, torch.tensor([-0.3, 0.0, -2.0, -0.01]), normal(2, 4, 8, 8, seed=seed + 4).float()


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.setattr(op, "_memory", Memory(8))
    with mock.patch.object(op, "_check", wraps=op._check) as checks:
        yield checks


def test_what_was_checked_once_is_not_checked_again(checks):
    for seed in range(3):
        x = inputs(seed=seed)
        out, end = scan(*x)
        exact, exact_end = oracles.recurrence(*(t.double() for t in x))
        assert_within(out, exact, terms=40)
        assert_within(end, exact_end, terms=40)
        assert checks.call_count == 1


def test_any_change_is_checked_and_refused_as_at_first(checks):
    q, k, v, decay, state = given = inputs()
    for _ in range(2):
        scan(*given)
    wrong = (
        (q, k[:, :, :39], v, decay, state), (q, k.double(), v, decay, state), (q, k, v, decay[:3], state),
        (q, k, v, decay.int(), state), (q, k, v, decay, state[:1]), (q, k, v, decay, state.int()),
        (q, k, v, decay.to("meta"), state), (q[0], k, v, decay, state), (q[:, :3], k, v, decay[:3], state[:, :3]),
    )  # fmt: skip
    for x in wrong:
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)):
                scan(*x)
    for _ in range(2):
        with pytest.raises(ValueError, match="chunk must be at least 1"):
            scan(*given, chunk=0)
    # each of these is another call, not a wrong one; what is not per head, or learned, is checked each time
    checks.reset_mock()
    learned = decay.clone().requires_grad_()
    for x in ((q, k, v, decay), (q, k, v), (q, k, v, decay[None, :, None].expand(2, 4, 40)), (q, k, v, learned)):
        for _ in range(2):
            assert scan(*x)[0].isfinite().all()
    assert checks.call_count == 6
    (gradient,) = torch.autograd.grad(scan(q, k, v, learned)[0].sum(), learned)
    assert gradient.any()


def test_signatures_are_bounded(checks):
    for tokens in range(20, 50):
        scan(*inputs(tokens))
        assert len(op._memory.known) <= 8


def test_a_compiler_sees_none_of_it(monkeypatch):
    monkeypatch.setattr(op, "_memory", Memory(8))
    q, k, v, *_ = inputs()
    mech = LightningAttention()
    want = mech.reference(*(x.double() for x in (q, k, v)))
    torch._dynamo.reset()
    traced = torch.compile(mech, backend="eager", fullgraph=True)
    for _ in range(3):
        assert_within(traced(q, k, v), want, terms=40)
    assert not op._memory.known


def tensors(width=64, dtype=torch.bfloat16, groups=2, tokens=2048):
    q, k, v, d_out = (torch.zeros(1, h, tokens, width, dtype=dtype) for h in (4, groups, groups, 4))
    return q, k, v, d_out


RELEASED = Decays(lightning_attention._log_decays, ("released", 0, 1))


@compiles
@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, ["scan_sums", "scan_join", "scan_hopper"], ["scan_hopper", "scan_sums", "scan_join", "scan_hopper"]),
        ({"width": 32}, ["scan_sums", "scan_walk"], ["scan_sums", "scan_walk", "scan_sums", "scan_back"]),
        ({"width": 32, "dtype": torch.float32}, ["scan_sums", "scan_walk"], ["scan_sums", "scan_walk"] * 3),
    ],
    ids=["hopper", "narrow", "float32"],
)
def test_every_launch_of_scan_is_recorded(options, forward, backward):
    """A launch that goes past `start` would be missing in every replay."""
    q, k, v, d_out = tensors(**options)
    makes = mock.Mock(wraps=RELEASED.make)
    made = RELEASED._replace(make=makes)
    with compiled.recording() as launches:
        slots = q, k, v, None, None
        there = tuple(x is not None for x in slots)
        found, first = replay.record(plans._filled, (q, k, v), (kernels.whole, there, (made, True)))
        slots = d_out, None, q, k, v, None, None, *(found[2:] or [None])
        there = tuple(x is not None for x in slots)
        given = [x for x in slots if x is not None]
        grads, second = replay.record(plans._filled, given, (kernels.whole_backward, there, (made,)))
    assert [x.kernel.metadata.name for x in first.launches] == forward
    assert [x.kernel.metadata.name for x in second.launches] == backward
    assert [x.name for x in launches] == forward + backward
    assert [x.shape[1] for x in grads] == [4] * 3
    # made once, and kept with the recording
    assert makes.call_count == 2
    assert [x.shape for recording in (first, second) for x in recording.constants] == [(4,)] * 2


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_launch_of_averages_is_recorded(dtype):
    q, k, v, d_out = tensors(dtype=dtype)
    with compiled.recording() as launches:
        kept, first = replay.record(prefix.averages, (q, k, v), (0.125, True))
        given = d_out, q, k, v, *kept
        grads, second = replay.record(prefix.averages_backward, given, (0.125,))
        _, third = replay.record(prefix.averages, (q, k, v), (0.125, False))
    names = [x.kernel.metadata.name for recording in (first, second) for x in recording.launches]
    assert names == [
        "prefix_scores", "prefix_sums", "prefix_walk",
        "prefix_back_sums", "prefix_back", "prefix_scores_back", "prefix_scores_query",
    ]  # fmt: skip
    assert [x.name for x in launches] == names + names[:3]
    # what rounding took is kept for the backward alone
    assert len(kept) == (3 if dtype == torch.float32 else 4)
    assert (third.single, len(third.outputs)) == (True, 1)
    assert [(x.shape, x.dtype) for x in grads] == [(q.shape, dtype), (k.shape, dtype), (d_out.shape, dtype)]


@compiles
@pytest.mark.parametrize("width", [64, 32])
def test_one_kernel_for_all_lengths(width):
    with compiled.recording() as launches:
        for tokens in (2048, 5001, 1 << 20):
            q, k, v, d_out = (
                torch.empty(1, h, tokens, width, dtype=torch.bfloat16, device="meta") for h in (4, 2, 2, 4)
            )
            out, _, *before = kernels.whole(q, k, v, None, None, RELEASED, True)
            kernels.whole_backward(d_out, None, q, k, v, None, None, *(before or [None]), RELEASED)
            out, *kept = prefix.averages(q, k, v, 0.125, True)
            prefix.averages_backward(d_out, q, k, v, out, *kept, 0.125)
    per_length = len(launches) // 3
    assert [x.hash for x in launches[:per_length]] * 3 == [x.hash for x in launches]
