"""Means of further blocks in the interpreter, against those of all blocks at once in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels.growth import Trees, grow
from farfield.mechanisms.fma import FMA
from farfield.ops import growth
from farfield.ops.pool import Tree
from farfield.testing.units import assert_within


def means(x, tree, each):
    """By definition: rows of each level."""
    found = []
    for height, groups in enumerate(tree.groups):
        size = (tree.block // each) << height
        there = (torch.arange(groups * each * size) >= tree.lo).view(-1, size)
        tokens = x[:, :, : there.numel()].double().unflatten(2, there.shape) * there[..., None]
        found.append(tokens.sum(3) / there.sum(1).clamp(min=1)[:, None])
    return found


@pytest.mark.parametrize(
    ("rank", "detail", "sinks", "most", "stops"),
    [
        (4, 16, 0, 48, (1, 2, 5, 37, 38, 101)),
        (8, 4, 3, 48, (13, 14, 15, 16, 64)),
        (2, 2, 16, 3, (7, 8, 27, 28)),
        (16, 16, 5, 48, (70,)),
        (1, 1, 0, 48, (130, 131, 260)),
    ],
    ids=str,
)
def test_blocks_in_parts_are_all_blocks_at_once(rank, detail, sinks, most, stops):
    block, heads, width = 16, 2, 16
    gen = torch.Generator().manual_seed(len(stops))
    blocks, lead = stops[-1] + 9, -(-sinks // rank) * rank
    # keys that are rotated, all of them; keys that are not, and values, from some block on and with other strides
    k, raw, v = (torch.randn(2, blocks * block, heads, width, generator=gen).half().transpose(1, 2) for _ in range(3))
    raw = raw.contiguous()
    tree = Tree(block, rank, blocks, min(blocks.bit_length(), most), True, sinks, blocks * block)
    sketches = torch.full((2, heads, sum(tree.groups) * detail, width), torch.nan)
    far_k, far_v = (torch.full((2, heads, tree.rows, width), torch.nan).half() for _ in range(2))
    trees = Trees(sketches, far_k, far_v, block, rank, detail, lead, sinks, blocks)
    waiting, done = sketches.new_empty(2, heads, 2, 0, rank, width), 0
    for stop in stops:
        first = max(done - 2, 0) * block
        here = k[:, :, : stop * block], raw[:, :, first:], v[:, :, first : stop * block]
        waiting = grow(*here, (0, first, first), trees, waiting, done, stop, most)
        done = stop
        wanted = tree._replace(blocks=stop, levels=min(stop.bit_length(), most))
        assert waiting.shape[3] == wanted.levels
        for n, (x, found, each, begin) in enumerate(
            ((k, sketches, detail, 0), (raw, far_k, rank, lead), (v, far_v, rank, lead))
        ):
            at = begin
            for height, want in enumerate(means(x, wanted, each)):
                rows = want.shape[2]
                assert_within(found[:, :, at : at + rows], want, terms=block << height)
                # what is not there yet is not written to
                room = (blocks >> height) * each
                assert found[:, :, at + rows : at + room].isnan().all()
                if n and (stop >> height) % 2 and height + 1 < most:
                    assert_within(waiting[:, :, n - 1, height], want[:, :, -rank:], terms=block << height)
                at += room
            assert found[:, :, :begin].isnan().all()


@pytest.mark.parametrize("options", [{}, {"sinks": 3, "hold": 4}, {"horizon": 160, "sinks": 5}], ids=str)
def test_chunks_by_the_kernel_are_forward(options, monkeypatch):
    """States that go on by the kernel, without it, cropped, and with their tokens in host memory."""
    refusal = growth.refusal
    mech = FMA(block=16, near=16, rank=4, open=2, rewind=20, **options)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 620, 16, generator=gen) for _ in range(3))
    whole, state, at, grown = mech.double()(*(x.double() for x in (q, k, v))), None, 0, []
    original = growth.grow
    monkeypatch.setattr(growth, "grow", lambda *args, **more: grown.append(1) or original(*args, **more))
    with torch.no_grad():
        for n, (many, by_kernel) in enumerate(
            (
                (100, True),
                (17, True),
                (1, True),
                (150, True),
                (40, False),
                (60, True),
                (180, True),
                (30, False),
                (9, True),
            )
        ):
            monkeypatch.setattr(growth, "refusal", (lambda *_: None) if by_kernel else refusal)
            before = len(grown)
            out, state = mech.extend(*(x[:, :, at : at + many] for x in (q, k, v)), state)
            assert_within(out, whole[:, :, at : at + many], terms=620)
            assert by_kernel or len(grown) == before
            at += many
            if n == 3:
                state, at = state.crop(13), at - 13
            if n == 5:
                state = state.to_host()
    assert len(grown) > 6
