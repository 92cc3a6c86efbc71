"""When an operation may call its implementation itself: the dispatcher costs tens of microseconds of Python a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack

_PLAIN = (Tensor, nn.Parameter)


def eager(*tensors: Tensor) -> bool:
    """Whether nobody would see the registered operation: no compiler, dispatch mode, transform, subclass or fake."""
    # first: what follows is nothing that a compiler could trace
    if torch.compiler.is_compiling():
        return False
    if _len_torch_dispatch_stack() or _are_functorch_transforms_active():
        return False
    return all(type(x) in _PLAIN and not x.is_meta for x in tensors)


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd needs a node for an operation on these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
