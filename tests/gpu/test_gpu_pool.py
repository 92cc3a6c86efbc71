"""pool, the lists and FMA around them on a GPU, against the same calls in float64."""

from functools import partial

import drawn
import pytest
import torch

import farfield as ff
from farfield.ops.pool import Tree, pool
from farfield.select.static import depth, radii, tree_lists
from farfield.summarize import FilterPool, MeanPool, pyramid
from farfield.testing import contract, inputs
from farfield.testing.captured import replayed
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


def whole(tokens, block, rank, lo=0):
    blocks = -(-tokens // block)
    return Tree(block, rank, blocks, depth(blocks), complete=False, lo=lo, hi=tokens)


def complete(tokens, block, rank, lo=0):
    blocks = (tokens - 1) // block - 1
    return Tree(block, rank, blocks, blocks.bit_length(), complete=True, lo=lo, hi=blocks * block)


draw = partial(drawn.draw, dtype=torch.float64)


SMALL, LARGE, TINY = ((64, 4), 4099, 3), ((128, 16), 9001, 0), ((16, 1), 2048, 7)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "learned", "widths", "make", "sizes", "tokens", "lo"),
    [
        (BF16, False, (64, 64), complete, *SMALL),
        (BF16, False, (64, 64), whole, (64, 4), 300_001, 3),
        (BF16, False, (128, 128), whole, *LARGE),
        (BF16, False, (16, 16), whole, *TINY),
        (BF16, False, (256, 128), complete, *LARGE),
        (FP16, False, (80, 96), complete, *SMALL),
        (FP32, False, (112, 192), whole, *SMALL),
        (BF16, True, (64, 64), whole, *SMALL),
        (FP16, True, (64, 64), complete, *TINY),
        (FP32, True, (80, 96), complete, *LARGE),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),  # a function by its name, not by its address
)
def test_against_float64(dtype, learned, widths, make, sizes, tokens, lo):
    tree, rank = make(tokens, *sizes, lo=lo), sizes[1]
    # views of [B, S, H, D]
    x = [draw(2, tokens, 2, w, seed=i).transpose(1, 2).requires_grad_() for i, w in enumerate(widths)]
    y = [t.detach().to(dtype).requires_grad_() for t in x]
    pools = [(FilterPool(2, rank) if learned else MeanPool()).cuda() for _ in range(2)]
    pools[0].double()
    for a, b in zip(pools[0].parameters(), pools[1].parameters(), strict=True):
        a.data = draw(*a.shape, seed=9)
        b.data = a.data.float()
    exact = pyramid(pools[0], *x, tree)
    given = [draw(*t.shape, seed=20 + i) for i, t in enumerate(exact[:4])]
    torch.autograd.backward(list(exact[:4]), given)
    with inputs.on("cuda"), contract.poisoned_memory():
        got = pyramid(pools[1], *y, tree)
        torch.autograd.backward(list(got[:4]), [t.to(dtype) for t in given])
    for name in ("far_k", "far_v", "bias"):
        assert_within(getattr(got, name), getattr(exact, name), terms=tokens, name=name)
    assert torch.equal(got.span, exact.span)
    for name, a, b in zip("kv", y, x, strict=True):
        assert_within(a.grad, b.grad, terms=tokens, name=f"d{name}")
    for (name, a), b in zip(pools[1].named_parameters(), pools[0].parameters(), strict=True):
        # children are read as they were stored
        assert_within(a.grad.to(dtype), b.grad, terms=tokens, name=name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [1, 3, 517, 16_384])
def test_lists(blocks, causal):
    for near, sinks in ((1, 0), (2, 3), (5, 1)):
        radius = radii(near, 1, depth(blocks))
        # negative where the first groups of a level are forgotten
        starts = [sinks or -9]
        for height in range(len(radius) - 1):
            starts.append(starts[-1] + -(-blocks // 2**height))
        want, got = (
            tree_lists(blocks, radius, starts[:-1], causal, sink_groups=sinks, device=x) for x in ("cpu", "cuda")
        )
        for a, b in zip((*want[0], *want[1]), (*got[0], *got[1]), strict=True):
            assert torch.equal(a, b.cpu())


def test_offsets_beyond_int32():
    tokens, tree = 1 << 21, whole(1 << 21, 64, 4)
    base = torch.empty(tokens, 1088, device="cuda", dtype=torch.bfloat16)
    k = base[None, None, :, -64:]
    k.copy_(torch.randn(tokens, 64, device="cuda"))
    got = pool(k, k, None, tree).far_k
    starts, at = [0], torch.randint(0, tree.rows, (64,), generator=torch.Generator().manual_seed(0))
    for groups in tree.groups:
        starts.append(starts[-1] + groups * tree.rank)
    for r in [*at.tolist(), starts[1] - 1, tree.rows - 1]:
        height = sum(r >= s for s in starts[1:])
        width = 16 << height
        first = (r - starts[height]) * width
        exact = k[0, 0, first : first + width].double().mean(0)
        assert_within(got[0, 0, r], exact, terms=width, name=f"row {r}")


@pytest.mark.parametrize("pool", ["mean", "learned", "strided", "dense"])
def test_repeats_are_bitwise_equal(pool):
    mech = ff.FMA(block=64, near=64, rank=4, pool=pool, kv_heads=2, width=64).cuda()
    x = [draw(1, h, 9000, 64, seed=h).bfloat16().requires_grad_() for h in (4, 2, 2)]

    def run():
        out = mech(*x)
        return out, *torch.autograd.grad(out.square().sum(), [*x, *mech.parameters()])

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("pool", ["mean", "strided", "dense-strided"])
def test_a_training_step_is_captured(pool):
    mech = ff.FMA(block=64, near=64, rank=4, pool=pool, kv_heads=2, width=64).cuda()
    x = [draw(1, 2, 4096, 64, seed=i).bfloat16().requires_grad_() for i in range(3)]

    def step():
        out = mech(*x)
        return out, *torch.autograd.grad(out, x, torch.ones_like(out))

    want, got = replayed(step)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
