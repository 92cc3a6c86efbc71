"""The attend kernel in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import os
import random

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

import farfield as ff
from farfield.kernels.attend import refusal
from farfield.kernels.launch import attend_forward
from farfield.ops.attend import Call, Plan
from farfield.testing import oracles
from farfield.testing.units import assert_within


def arguments(q, sources, position=None, group=None):
    """The same call for an implementation."""
    none = q.new_empty(0)

    def per_head(x):
        return none if x is None else x[None, None] if x.dim() == 1 else x

    plans = [Plan(p.q_block, p.k_block, p.causal, -1 if p.reach is None else p.reach, p.sinks) for _, p in sources]
    rows = [r for r, _ in sources]
    per_row = ([per_head(getattr(r, name)) for r in rows] for name in ("bias", "end", "group"))
    return Call(
        q, [r.k for r in rows], [r.v for r in rows], *per_row, per_head(position), per_head(group),
        [p.index for _, p in sources], [p.count for _, p in sources], plans, q.shape[-1] ** -0.5,
    )  # fmt: skip


def problem(seed):
    pick, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, tokens = pick.choice([1, 2]), pick.choice([1, 2]), pick.choice([1, 7, 33])
    heads, width, value_width = kv_heads * pick.choice([1, 3]), pick.choice([16, 24]), pick.choice([16, 40])
    q_block = pick.choice([1, 5, 16])

    def draw(*shape):
        return torch.randn(shape, generator=gen).half().double()

    sources = []
    for _ in range(pick.choice([1, 2])):
        rows, k_block = pick.choice([1, 20, 50]), pick.choice([1, 4, 7, 16])
        blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
        picks = pick.randint(0, row_blocks)
        lead = pick.choice([1, batch]), pick.choice([1, heads])
        order = torch.rand(*lead, blocks, row_blocks, generator=gen).argsort(-1)
        index = order[..., :picks].sort(-1).values.to(torch.int32)
        count = torch.randint(0, picks + 1, (*lead, blocks), generator=gen, dtype=torch.int32)
        layout = ff.Layout(
            index,
            count,
            q_block,
            k_block,
            tokens,
            rows,
            pick.random() < 0.5,
            pick.choice([None, 9]),
            pick.choice([0, 3]),
        )
        bias = draw(1, pick.choice([1, kv_heads, heads]), rows) if pick.random() < 0.5 else None
        end = torch.randint(0, 40, (1, kv_heads, rows), generator=gen) if pick.random() < 0.5 else None
        group = torch.randint(0, 2, (1, 1, rows), generator=gen)
        k, v = draw(batch, rows, kv_heads, width).transpose(1, 2), draw(batch, kv_heads, rows, value_width)
        sources.append((ff.Rows(k, v, end, bias, group), layout))
    position = torch.randint(0, 40, (tokens,), generator=gen) if pick.random() < 0.5 else None
    group = torch.randint(0, 2, (batch, 1, tokens), generator=gen)
    return draw(batch, heads, tokens, width), sources, position, group


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_random_calls(seed, dtype):
    q, sources, position, group = problem(seed)
    out, lse = oracles.attend(q, sources, position=position, group=group)
    small = [
        (ff.Rows(r.k.to(dtype), r.v.to(dtype), r.end, None if r.bias is None else r.bias.float(), r.group), p)
        for r, p in sources
    ]
    got, got_lse = attend_forward(arguments(q.to(dtype), small, position, group))
    terms = sum(len(r) for r, _ in sources)
    assert_within(got, out, terms=terms)
    assert_within(got_lse, lse, terms=terms, name="lse")


def test_refusals_say_why():
    def call(q, v, sources=1):
        layout = ff.select.full(tokens=4, rows=4)
        return arguments(q, [(ff.Rows(q, v), layout)] * sources)

    q, wide = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4, 300)
    assert refusal(call(q, q)) is None
    assert refusal(call(q.double(), q)) == "takes bfloat16, float16 and float32, not torch.float64"
    assert refusal(call(q, wide)) == "takes widths up to 256, got D=16 and E=300"
    assert refusal(call(q, q, 3)) == "takes 2 sources, got 3"
