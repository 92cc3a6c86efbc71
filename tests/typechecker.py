"""The run-time type checker of FARFIELD_TYPECHECK=1: beartype, for everything it can check."""

from collections.abc import Sequence

import jaxtyping._decorator
from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from torch import Tensor

# custom_op looks up annotations in the globals of the function it is given: those of jaxtyping's wrapper
vars(jaxtyping._decorator).update(Tensor=Tensor, Sequence=Sequence)


def checked(function):
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        # jaxtyping decorates methods one by one; beartype knows `Self` in decorated classes only
        return function
