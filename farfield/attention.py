"""attention: any mechanism behind the signature of PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from farfield import mechanisms
from farfield.mechanism import Mechanism


def attention(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S E"],
    mechanism: str | Mechanism = "fma",
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "B H T E"]:
    """scaled_dot_product_attention with another mechanism: same names, same defaults, and what cannot be honoured is
    refused.

    Args:
        mechanism: a registry name, built once with its defaults, or a Mechanism of your own making.
        attn_mask: only "full" takes one, as PyTorch does. Padding and documents are `group` of a mechanism's forward.
        dropout_p: only "full" takes one.
        is_causal: aligned upper-left, as in PyTorch.
        enable_gqa: must be set where key and value have fewer heads, as in PyTorch.

    Raises:
        TypeError: no tensors, or no name and no built Mechanism.
        ValueError: shapes do not fit, the name is unknown, or a Mechanism was built for other `is_causal` or `scale`.
        NotImplementedError: the mechanism cannot honour an argument.
    """
    if not isinstance(mechanism, str | Mechanism):
        raise TypeError(f"attention: mechanism must be a name or a built Mechanism, such as FMA(), got {mechanism!r}")
    name = mechanism if isinstance(mechanism, str) else mechanism.name
    for given, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attention: {given} must be a tensor, got {type(x).__name__}")
    if query.dim() == 4 and key.dim() == 4 and query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"attention: {query.shape[1]} query heads and {key.shape[1]} key heads need enable_gqa=True")
    if isinstance(mechanism, Mechanism):
        _check_agrees(mechanism, is_causal, scale)
        scale = mechanism.scale
    if name == "full" and (attn_mask is not None or dropout_p):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None:
        raise NotImplementedError(
            f"attention: {name} cannot honour attn_mask; documents and padding go in as "
            f"farfield.mechanisms.make({name!r})(q, k, v, group=...)"
        )
    if dropout_p:
        raise NotImplementedError(f"attention: {name} has no dropout, got dropout_p={dropout_p}")
    if isinstance(mechanism, str):
        _build(name, is_causal, scale)
        mechanism = _built[name, is_causal, scale]
    return mechanism(query, key, value)


# mechanisms with their defaults, by name, causal and scale; the oldest goes first
_built: dict[tuple[str, bool, float | None], Mechanism] = {}


def _build(name: str, causal: bool, scale: float | None) -> bool:
    """Whether it is in `_built`, now at the latest."""
    if (name, causal, scale) not in _built:
        made = mechanisms.make(name, causal=causal, scale=scale)
        while len(_built) >= 256:
            del _built[next(iter(_built))]
        _built[name, causal, scale] = made
    return True


# a constant of what is traced, made then: no compiler follows how a mechanism is found
_build._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_agrees(mechanism: Mechanism, is_causal: bool, scale: float | None) -> None:
    name = mechanism.name
    if mechanism.causal != is_causal:
        raise ValueError(
            f"attention: is_causal={is_causal}, but this {name} was built with causal={mechanism.causal}; "
            "make them agree"
        )
    if scale is not None and mechanism.scale != scale:
        raise ValueError(f"attention: scale={scale}, but this {name} was built with scale={mechanism.scale}")
