"""multipole: causal FMA with mean pooling in one operation, where the kernels take it."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op

from farfield.ops.eager import eager, recorded
from farfield.ops.pool import Tree

if TYPE_CHECKING:
    from farfield.kernels.multipole import Whole

KEPT = 64  # plans
RANKS = (1, 2, 4, 8, 16, 32)


LEVELS = 64  # more than there can be


class Field(NamedTuple):
    """FMA's options: tokens of a block, tokens read one by one before it, rows of a group, first tokens always read,
    and levels at most, beyond which nothing is read.
    """

    block: int
    near: int
    rank: int
    sinks: int
    most: int = LEVELS


def reached(blocks: int, radius: int) -> int:
    """Levels that some query of so many blocks reads, where `radius` blocks to each side are read one by one."""
    levels = 0
    while (blocks - 1 >> levels) > radius:
        levels, radius = levels + 1, -(-radius // 2)
    return levels


def reaches(levels: int, blocks: int, radius: int) -> bool:
    """Whether queries of so many blocks read everything by so many levels."""
    return blocks - 1 >> levels <= radius + (1 << levels) - 1 >> levels


@lru_cache(maxsize=256)
def tree_of(tokens: int, field: Field) -> Tree:
    """What is summarized: all that the last query does not read one by one, in complete groups."""
    block, near, rank, sinks, most = field
    blocks, radius = -(-tokens // block), near // block
    done = blocks - 1 - radius
    return Tree(block, rank, done, min(reached(blocks, radius), most), True, sinks, done * block)


def kept_parts(q: torch.Size, k: torch.Size, size: int, field: Field) -> tuple[int, int, int, int]:
    """Where far keys, far values and bias start behind lse, in bytes, and how many bytes they are.

    Room for the rows of as many levels as there can be, two groups a block: then sizes follow from the length without
    steps, and one graph serves all lengths.
    """
    batch, heads, tokens, width = q
    block, near, rank, sinks, _ = field
    rows = -(-sinks // rank) * rank + 2 * rank * (-(-tokens // block) - 1 - near // block)
    far = batch * k[1] * rows * width * size
    first = -(-batch * heads * tokens * 4 // 128) * 128
    return first, first + far, first + 2 * far, first + 2 * far + 4 * rows


def refusal(q: Tensor, k: Tensor, v: Tensor, field: Field, scale: float | None) -> str | None:
    """Why `multipole` cannot take these tensors, None if it can; by shapes, dtypes and device."""
    if q.device.type != "cuda" or _capability(q.device) != 9:
        return "takes tensors on Hopper GPUs"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    width, block = q.shape[3], field.block
    if width not in (64, 128) or v.shape[3] != width:
        return f"takes D = E = 64 or 128, got {width} and {v.shape[3]}"
    if block not in (64, 128) or field.rank not in RANKS:
        return (
            f"takes blocks of 64 and 128 and groups of {', '.join(map(str, RANKS))} rows, got {block} and {field.rank}"
        )
    if q.shape[2] <= field.near + block or not q.shape[0] * q.shape[1]:
        return "takes sequences with a far field, at least one of them"
    if scale is not None and scale <= 0:
        return f"takes positive scales, got {scale}"
    return None


def _capability(device: torch.device) -> int:
    return _major(device)


# a constant of what is traced; torch.compiler.assume_constant_result sets this too, and loads Dynamo to do it
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def multipole(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    field: Field,
    scale: float | None = None,
) -> Float[Tensor, "B H T D"]:
    """FMA(**field)(q, k, v): summaries, lists and attention.

    The kernels are those of `pool` and `attend`, or know the tree and need no lists; a call costs the host less.
    Differentiable in q, k and v. Takes what `refusal` has nothing against; what lies in memory as no kernel reads it is
    copied.
    """
    if not eager(q, k, v):
        return _forward(q, k, v, *field, q.shape[3] ** -0.5 if scale is None else float(scale))[0]
    return _run(_plan(q, k, v, field, scale), q, k, v)


def again(q: Tensor, k: Tensor, v: Tensor, field: Field, scale: float | None) -> Tensor | None:
    """`multipole`, if it has taken a call with these shapes, strides, dtypes and devices before; otherwise None.

    What was checked then need not be checked again.
    """
    if not eager(q, k, v):
        return None
    plan = _plans.get(_key(q, k, v, field, scale))
    return None if plan is None else _run(plan, q, k, v)


def _key(q: Tensor, k: Tensor, v: Tensor, field: Field, scale: float | None) -> tuple[Any, ...]:
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, field, scale,
    )  # fmt: skip


def _plan(q: Tensor, k: Tensor, v: Tensor, field: Field, scale: float | None) -> Whole:
    """What the kernels keep for calls like this one."""
    key = _key(q, k, v, field, scale)
    plan = _plans.get(key)
    if plan is None:
        from farfield.kernels.multipole import Whole

        plan = Whole(key[:3], key[3:6], field, q.shape[3] ** -0.5 if scale is None else float(scale))
        with _lock:
            while len(_plans) >= KEPT:
                del _plans[next(iter(_plans))]
            _plans[key] = plan
    return plan


# the oldest goes first; a plan holds lists and launches, not q, k and v
_plans: dict[tuple[Any, ...], Whole] = {}
_lock = threading.Lock()


def forget() -> None:
    """Give back what is kept for further calls."""
    with _lock:
        _plans.clear()


def _run(plan: Whole, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if recorded(q, k, v):
        return _Multipole.apply(q, k, v, plan)
    return plan.forward(q, k, v)[0]


class _Multipole(torch.autograd.Function):
    """The operation below without the dispatcher."""

    @staticmethod
    def forward(ctx, q, k, v, plan):
        out, kept = plan.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, kept = ctx.saved_tensors
        plan = ctx.plan
        # the registered operation refuses a gradient of its gradients
        if torch.is_grad_enabled() or not eager(d_out, q, k, v):
            return *_backward(d_out, q, k, v, out, kept, *plan.field, plan.scale), None
        return *plan.backward(d_out, q, k, v, out, kept), None


@custom_op("farfield::multipole", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, block: int, near: int, rank: int, sinks: int, most: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _plan(q, k, v, Field(block, near, rank, sinks, most), scale).forward(q, k, v)


@_forward.register_fake
def _(q, k, v, block, near, rank, sinks, most, scale):
    size = kept_parts(q.shape, k.shape, q.element_size(), Field(block, near, rank, sinks, most))[-1]
    return q.new_empty(q.shape), q.new_empty(size, dtype=torch.uint8)


@custom_op("farfield::multipole_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor,
    block: int, near: int, rank: int, sinks: int, most: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _plan(q, k, v, Field(block, near, rank, sinks, most), scale).backward(d_out, q, k, v, out, kept)


@_backward.register_fake
def _(d_out, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *field, scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.about = *field, scale


def _differentiate(ctx, d_out, d_kept):
    return *_backward(d_out, *ctx.saved_tensors, *ctx.about), *[None] * len(ctx.about)


def _refuse(ctx, *grads):
    raise NotImplementedError("fma: first derivatives only; the gradient of a gradient is not implemented")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
