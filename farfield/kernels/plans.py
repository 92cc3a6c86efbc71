"""attend, pool, scans and the lists of patterns as recorded launches (kernels.replay), where calls come again.

What a call launches follows from its signature: shapes, strides, dtypes, device and options. The first call of one
goes the ordinary way, since a length that never comes again is not worth a recording; the second is recorded. Lists
are inputs, data that differ from call to call. A backward whose lists are sorted is two recordings, with the sort
between them. What cannot be recorded, because an input is copied or converted on the way, goes the ordinary way for
good.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farfield.kernels import attend_backward, attend_listed, attend_own, pool
from farfield.kernels.attend_listed_backward import at_once, attend_listed_backward
from farfield.kernels.launch import attend_forward
from farfield.kernels.replay import Recorded, Refused
from farfield.ops.attend import Call, Plan
from farfield.ops.eager import thread
from farfield.ops.known import Known, Memory, form
from farfield.ops.pool import Tree

KEPT = 256  # signatures; a call with its backward has three
LONGEST = 1 << 15  # query blocks: what is longer takes longer than its launches

_memory = Memory(KEPT)


class Numbers(NamedTuple):
    """What of a call is no tensor, and which of its tensors are there, in the order of `_parts`."""

    there: tuple[bool, ...]
    plans: tuple[Plan, ...]
    scale: float


def forward(call: Call, known: Known | None = None) -> tuple[Tensor, Tensor]:
    """kernels.launch.attend_forward. `known`: of signatures that tell calls apart as `_signature` does."""
    if not _takes(call):
        return attend_forward(call)
    tensors, numbers = _parts(call)
    known = _memory.of((_forward, *_signature(tensors, numbers))) if known is None else known
    return run(known, _forward, tensors, numbers)


def backward(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> list[Tensor]:
    """kernels.attend_backward.attend_backward."""
    if attend_listed.wants(call):
        return [*_listed(call, d_out, d_lse, out, lse), torch.zeros_like(call.bias[0])]
    if not _takes(call):
        return attend_backward.attend_backward(call, d_out, d_lse, out, lse, bias_grad)
    tensors, numbers = _parts(call)
    signature = _signature(tensors, numbers)
    d_out, out, lse = attend_backward.dense(d_out), out.contiguous(), lse.contiguous()
    given = [d_out, out, lse]
    if not attend_backward.counts(call):
        given += run(_memory.of((_keys, *signature)), _keys, tensors, numbers).sort(stable=True)
    if d_lse is not None:
        given.append(d_lse.contiguous())
    key = _gradients, bias_grad, form(d_out), d_lse is None, *signature
    d_q, *found = run(_memory.of(key), _gradients, [*given, *tensors], numbers, len(given), bias_grad)
    grads, at = [], 0
    for bias in call.bias:
        end = at + 3 if bias_grad and bias.dim() > 1 else at + 2
        grads.append(found[at:end])
        at = end
    return attend_backward.gather(call, d_q, grads)


def _listed(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor
) -> Sequence[Tensor]:  # fmt: skip
    """Gradients of q, k and v, of lists of a query's own."""
    # what is copied is not recorded
    d_out, out, lse = d_out.contiguous(), out.contiguous(), lse.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    if not attend_own.wants(call):
        return _read(call, d_out, d_lse, out, lse)
    if d_out.data_ptr() % 16:
        d_out = d_out.clone()
    _, others = attend_own.parts(call)
    folded = others.q.shape[:3]
    d_q, d_k, d_v = _read(
        others, d_out.view(*folded, -1), None if d_lse is None else d_lse.view(folded), out.view(*folded, -1),
        lse.view(folded), folded[2] // call.q.shape[2],
    )  # fmt: skip
    return d_q.view(call.q.shape), d_k, d_v


def _read(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, folded: int = 0
) -> Sequence[Tensor]:  # fmt: skip
    """attend_listed_backward."""
    if not (0 < call.index[0].shape[2] <= LONGEST and at_once(call)):
        return attend_listed_backward(call, d_out, d_lse, out, lse, folded)
    tensors, numbers = _parts(call)
    given = [d_out, out, lse] if d_lse is None else [d_out, out, lse, d_lse]
    key = _listed_gradients, form(d_out), folded, d_lse is None, *_signature(tensors, numbers)
    return run(_memory.of(key), _listed_gradients, [*given, *tensors], numbers, len(given), folded)


def pooled(k: Tensor, v: Tensor, filters: Tensor, tree: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels.pool.forward."""
    known = _memory.of((pool.forward, form(k), form(v), filters.shape, tree))
    return run(known, pool.forward, (k, v, filters), tree)


def pool_backward(
    near_k: Tensor, near_v: Tensor, d_far_k: Tensor, d_far_v: Tensor, far_k: Tensor, far_v: Tensor, filters: Tensor,
    tokens: int, tree: Tree,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kernels.pool.backward."""
    d_far_k, d_far_v = d_far_k.contiguous(), d_far_v.contiguous()
    given = near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters
    known = _memory.of((pool.launches, *[form(x) for x in given], tokens, tree))
    d_k, d_v, part = run(known, pool.launches, given, tokens, tree)
    return d_k, d_v, pool.added_up(part, d_k, d_v, tree)


def lists(build: Callable[..., Any], *options: Hashable, device: torch.device) -> Any:
    """build(*options, device), which makes lists out of numbers alone."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # a recording is of tensors, on the device of the first one
    none = torch.empty(0, dtype=torch.int32, device=device)
    return run(_memory.of((build, device, options)), _built, (none,), build, options)


def plainly(function: Callable[..., Any], inputs: Sequence[Tensor], *options: Hashable) -> Any:
    """function(*inputs, *options), of which the launches follow from what the inputs are like and from the options."""
    return run(_memory.of((function, *[form(x) for x in inputs], options)), function, inputs, *options)


def after(known: Known, *gradients: Tensor | None) -> Known:
    """What is known of the backward of a call, by the gradients that it is given."""
    return _memory.of((known, *[form(x) for x in gradients]))


def partly(
    function: Callable[..., Any], slots: Sequence[Tensor | None], *options: Hashable, known: Known | None = None
) -> Any:  # fmt: skip
    """`plainly`, where tensors may be absent. `known`: of all that tells calls apart, the function included."""
    if known is None:
        known = _memory.of((function, *[form(x) for x in slots], options))
    there = tuple([x is not None for x in slots])
    return run(known, _filled, [x for x in slots if x is not None], function, there, options)


def _filled(*given: Any) -> Any:
    *tensors, function, there, options = given
    rest = iter(tensors)
    return function(*[next(rest) if some else None for some in there], *options)


def run(known: Known, function: Callable[..., Any], inputs: Sequence[Tensor], *options: Any) -> Any:
    """function(*inputs, *options): recorded at the second call of a signature, replayed from the third on."""
    if not _on_gpu(inputs[0]) or thread.recording:
        # the interpreter's, or part of what is recorded as a whole
        return function(*inputs, *options)
    if known.run is None:
        known.calls += 1
        if known.calls == 1:
            return function(*inputs, *options)
        known.run = Recorded(function, *options)
    try:
        return known.run(*inputs)
    except Refused:
        known.run = lambda *tensors: function(*tensors, *options)
        return known.run(*inputs)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _takes(call: Call) -> bool:
    """Whether a call is recorded: neither empty nor long, nor one whose lists go through in chunks or are sorted."""
    blocks = call.index[0].shape[2]
    if not (0 < blocks <= LONGEST and call.q.numel() > 0):
        return False
    return not attend_listed.wants(call) or attend_listed.at_once(call)


def _parts(call: Call) -> tuple[list[Tensor], Numbers]:
    """The tensors of a call that are there, lists without gaps, and all else."""
    index, count = [x.contiguous() for x in call.index], [x.contiguous() for x in call.count]
    slots = (
        *call.k, *call.v, *index, *count, *call.bias, *call.end, *call.row_group, call.position, call.group,
    )  # fmt: skip
    there = tuple([x.dim() > 1 for x in slots])
    tensors = [call.q, *[x for x, some in zip(slots, there, strict=True) if some]]
    return tensors, Numbers(there, tuple(call.plans), call.scale)


def _call(tensors: Sequence[Tensor], numbers: Numbers) -> Call:
    """The inverse of `_parts`."""
    q, *rest = tensors
    none, rest = q.new_empty(0), iter(rest)
    slots = [next(rest) if some else none for some in numbers.there]
    n = len(numbers.plans)
    k, v, index, count, bias, end, row_group = (slots[i * n : (i + 1) * n] for i in range(7))
    return Call(q, k, v, bias, end, row_group, *slots[7 * n :], index, count, numbers.plans, numbers.scale)


def _signature(tensors: Sequence[Tensor], numbers: Numbers) -> tuple[Any, ...]:
    key: list[Any] = [numbers]
    for x in tensors:
        key += x.shape, x.stride(), x.dtype
    return *key, tensors[0].device


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    *tensors, numbers = given
    return attend_forward(_call(tensors, numbers))


def _keys(*given: Any) -> Tensor:
    *tensors, numbers = given
    return attend_backward.list_keys(_call(tensors, numbers))


def _gradients(*given: Any) -> list[Tensor]:
    """dq, then dk, dv and, where it is asked for, the bias gradient of each source, unit by unit."""
    *tensors, numbers, own, bias_grad = given
    call = _call(tensors[own:], numbers)
    d_out, out, lse, *rest = tensors[:own]
    read = None
    if not attend_backward.counts(call):
        ordered, order, *rest = rest
        read = attend_backward.sorted_readers(call, ordered, order)
    d_lse = rest
    sources, d_q, grads = attend_backward.gradients(call, d_out, d_lse[0] if d_lse else None, out, lse, bias_grad, read)
    return [d_q, *[x for grad in attend_backward.kept(sources, grads) for x in grad]]


def _listed_gradients(*given: Any) -> Sequence[Tensor]:
    *tensors, numbers, own, folded = given
    d_out, out, lse, *d_lse = tensors[:own]
    call = _call(tensors[own:], numbers)
    return attend_listed_backward(call, d_out, d_lse[0] if d_lse else None, out, lse, folded)


def _built(none: Tensor, build: Callable[..., Any], options: tuple[Any, ...]) -> Any:
    return build(*options, none.device)
