"""When an operation may call its implementation itself: the dispatcher costs tens of microseconds of Python a call."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter)


class _Thread(threading.local):
    recording = False


# whether the dispatch mode that sees this thread's operations only takes down what an implementation does
thread = _Thread()


def eager(*tensors: Tensor) -> bool:
    """Whether nobody would see the registered operation: no compiler, dispatch mode, transform, subclass or fake.

    Raises as `check_derivatives`.
    """
    # first: what follows is nothing that a compiler could trace
    if torch.compiler.is_compiling():
        return False
    check_derivatives(*tensors)
    if (_len_torch_dispatch_stack() and not thread.recording) or _are_functorch_transforms_active():
        return False
    for x in tensors:  # noqa: SIM110 (a generator would cost as much as all the rest)
        if type(x) not in PLAIN or x.is_meta:
            return False
    return True


def check_derivatives(*tensors: Tensor) -> None:
    """Refuse derivatives that no operation here has: PyTorch would leave out those in forward mode without a word.

    Raises:
        NotImplementedError: a tensor has a tangent, or torch.func wants its gradient.
    """
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "farfield: no derivatives in forward mode (torch.func.jvp, linearize, forward_ad); use autograd's backward"
        )
    transforms = (get_interpreter_stack() or ()) if _are_functorch_transforms_active() else ()
    if transforms and recorded(*tensors) and any(x.key() == TransformType.Grad for x in transforms):
        raise NotImplementedError(
            "farfield: no derivatives by torch.func (grad, vjp, jacrev); use backward or torch.autograd.grad"
        )


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd needs a node for an operation on these."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False
