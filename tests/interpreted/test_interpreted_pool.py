"""The kernels of pool and of the lists in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import pool as kernels
from farfield.kernels.lists import build
from farfield.ops.pool import Tree, pool
from farfield.select.static import depth, far_lists, near_lists, pack_lists, radii
from farfield.testing import contract
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within


def literal(x, filters, tree):
    """Far rows of x [B, G, S, D], row by row; filters [G, p, 2p]."""
    segment, p = tree.block // tree.rank, tree.rank

    def tokens(height, r):
        width = segment << height
        return range(max(r * width, tree.lo), min((r + 1) * width, tree.hi))

    rows = [x[:, :, : tree.lo], x.new_zeros(*x.shape[:2], tree.lead - tree.lo, x.shape[3])]
    counts, below = [1] * tree.lo + [0] * (tree.lead - tree.lo), {}
    for height, groups in enumerate(tree.groups):
        level = {}
        # groups that nobody stores may be children
        for r in range(p * (2 * tree.groups[height] + 2)):
            children = [r // p * 2 * p + c for c in range(2 * p)]
            at = tokens(height, r)
            if height and filters is not None and all(len(tokens(height - 1, c)) for c in children):
                mixed = torch.stack([below[c] for c in children], 2)
                level[r] = torch.einsum("gc,bgcd->bgd", filters[:, r % p], mixed)
            elif height and filters is not None and len(at):
                level[r] = sum(below[c] * len(tokens(height - 1, c)) for c in (2 * r, 2 * r + 1)) / len(at)
            else:
                level[r] = x[:, :, at.start : at.stop].mean(2) if len(at) else torch.zeros_like(x[:, :, 0])
        rows += [torch.stack([level[r] for r in range(groups * p)], 2)]
        counts += [len(tokens(height, r)) for r in range(groups * p)]
        below = level
    return torch.cat(rows, 2), torch.tensor(counts, dtype=torch.float64).log()


def spans(tree):
    found = [(i, i) for i in range(tree.lead)]
    for height, groups in enumerate(tree.groups):
        width = tree.block // tree.rank << height
        found += [(r * width, (r + 1) * width - 1) for r in range(groups * tree.rank)]
    return torch.tensor(found).mT


def small_chunks(monkeypatch):
    """So few rows a program that short sequences have heights above its own."""
    tiles, tiles_down = kernels.tiles, kernels.tiles_down

    def few(width, value_width, size, seg, rank, learned):
        tile, climb = tiles(width, value_width, size, seg, rank, learned)
        if learned:
            return tile | {"CHUNK": 4 * rank, "LIFTS": 2}, climb | {"CHUNK": 16, "LIFTS": (16 // rank).bit_length() - 1}
        return tile | {"CHUNK": 4, "LIFTS": 2}, climb | {"CHUNK": 2, "LIFTS": 1}

    def few_down(width, value_width, size, seg, rank, learned):
        chunk = 4 * rank if learned else 4
        return tiles_down(width, value_width, size, seg, rank, learned) | {"CHUNK": chunk, "LIFTS": 2}

    monkeypatch.setattr(kernels, "tiles", few)
    monkeypatch.setattr(kernels, "tiles_down", few_down)


def check(tree, tokens, dtype, learned):
    # views of [B, S, H, D], and E != D
    k = normal(1, tokens, 2, 24).transpose(1, 2).requires_grad_()
    v = normal(1, 2, tokens, 16, seed=1).requires_grad_()
    filters = (normal(2, 2, tree.rank, 2 * tree.rank, seed=2) / 2).requires_grad_() if learned else None
    (far_k, bias), (far_v, _) = (literal(x, filters[i] if learned else None, tree) for i, x in enumerate((k, v)))
    given = [normal(*x.shape, seed=3 + i) for i, x in enumerate((k, v, far_k, far_v))]
    exact = sum((x * y).sum() for x, y in zip((k, v, far_k, far_v), given, strict=True))
    exact.backward()

    small = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (k, v)]
    learnable = filters.detach().float().requires_grad_() if learned else None
    with contract.poisoned_memory():
        found = pool(*small, learnable, tree)
        torch.autograd.backward(list(found[:4]), [x.to(dtype) for x in given])
    assert_within(found.far_k, far_k, terms=tokens, name="far_k")
    assert_within(found.far_v, far_v, terms=tokens, name="far_v")
    assert_within(found.bias, bias[None, None], terms=1, name="bias")
    assert torch.equal(found.span, spans(tree))
    assert_within(small[0].grad, k.grad, terms=tokens, name="dk")
    assert_within(small[1].grad, v.grad, terms=tokens, name="dv")
    if learned and tree.levels > 1:
        # children are read as they were stored
        assert_within(learnable.grad.to(dtype), filters.grad, terms=tokens, name="filters")


def complete(tokens, block, rank, lo=0):
    blocks = (tokens - 1) // block - 1
    return Tree(block, rank, blocks, blocks.bit_length(), complete=True, lo=lo, hi=blocks * block)


def whole(tokens, block, rank, lo=0):
    blocks = -(-tokens // block)
    return Tree(block, rank, blocks, max(depth(blocks), 1), complete=False, lo=lo, hi=tokens)


@pytest.mark.parametrize(("tokens", "learned"), [(1, False), (5, True)])
def test_short(tokens, learned):
    check(whole(tokens, 4, 2), tokens, torch.float32, learned)


@pytest.mark.parametrize(
    ("tree", "learned", "dtype", "climbs"),
    [
        (complete(45, 4, 2), False, torch.float32, True),
        (complete(45, 4, 2, lo=3), True, torch.float32, True),
        (complete(21, 4, 2, lo=3), True, torch.float16, False),
        (whole(29, 2, 1, lo=1), True, torch.float32, True),
        (whole(43, 6, 3, lo=5), False, torch.float32, True),
        (whole(43, 6, 3, lo=5), False, torch.float16, False),
    ],
    ids=str,
)
def test_against_literal_rows(tree, learned, dtype, climbs, monkeypatch):
    if climbs:
        small_chunks(monkeypatch)
    check(tree, tree.hi + (7 if tree.complete else 0), dtype, learned)


def test_gradients_that_are_not_there():
    tree = whole(14, 4, 2)
    k, v = (normal(1, 2, 14, 16, seed=i).float().requires_grad_() for i in (0, 1))
    found = pool(k, v, None, tree)
    (alone,) = torch.autograd.grad(found.far_k.sum(), k, retain_graph=True)
    near_k, near_v = torch.autograd.grad(found.far_k.sum() + found.k.sum(), (k, v), allow_unused=True)
    assert_within(near_k, alone.double() + 1, terms=14)
    assert near_v is None or not near_v.any()


def test_traced_whole():
    tree = complete(20, 4, 2)
    k, v = (normal(1, 2, 20, 16, seed=i).float().requires_grad_() for i in (0, 1))

    def both(k, v):
        found = pool(k, v, None, tree)
        return found.k.sin() * found.v, found.far_k * found.far_v

    def run(f):
        near, far = f(k, v)
        return near, far, *torch.autograd.grad(near.sum() + far.square().sum(), (k, v))

    for got, want in zip(run(torch.compile(both, fullgraph=True, backend="aot_eager")), run(both), strict=True):
        assert torch.equal(got, want)


def listed(start, blocks, radius, starts, causal, first, sinks, device):
    """The lists of select.static, sorted."""
    n = torch.arange(start, blocks, device=device)
    near, used = near_lists(n, radius[0], causal, blocks)
    near = pack_lists(near - first, used)
    far, used = far_lists(n, radius, causal, blocks)
    lead = torch.arange(sinks).expand(len(n), -1)
    far = [lead, *(x + at for x, at in zip(far, starts, strict=True))]
    return *near, *pack_lists(torch.cat(far, -1), torch.cat([(n > radius[0])[:, None].expand_as(lead), *used], -1))


@pytest.mark.parametrize("causal", [True, False])
def test_lists(causal):
    for blocks, near, sinks in itertools.product((1, 21), (1, 3), (0, 2)):
        radius = radii(near, 1, depth(blocks))
        # negative where the first groups of a level are forgotten
        starts = [sinks or -9]
        for height in range(len(radius) - 1):
            starts.append(starts[-1] + -(-blocks // 2**height))
        for here in {0, blocks // 2}:
            shift, device = max(0, here - near), torch.device("cpu")
            call = here, blocks, radius, starts[:-1], causal, shift, sinks, device
            for got, want in zip(build(*call), listed(*call), strict=True):
                assert torch.equal(got[0, 0], want)
