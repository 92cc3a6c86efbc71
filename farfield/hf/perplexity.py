"""Perplexity of a causal language model on one long window, all tokens at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# what a model may do to its logits beside the output embedding
_LOGITS = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}


@dataclass(frozen=True)
class Perplexity:
    """Losses of the tokens 1 ... n - 1 of a window, each predicted from all before it.

    Args:
        losses: nats of each token, in order.
    """

    losses: Float[Tensor, " S"]

    def over(self, last: int | None = None) -> float:
        """The perplexity of all tokens, or of the last ones.

        Raises:
            ValueError: of none of them.
        """
        if last is not None and last < 1:
            raise ValueError(f"perplexity: last must be at least 1, or None for all tokens, got {last}")
        losses = self.losses if last is None else self.losses[-last:]
        return math.exp(float(losses.double().mean()))


@torch.no_grad()
def perplexity(model: nn.Module, ids: Int[Tensor, " n"], *, chunk: int = 1024) -> Perplexity:
    """Run `model` once over `ids`.

    Args:
        model: a PreTrainedModel for causal language modelling.
        ids: token ids of the window, n >= 2.
        chunk: tokens whose logits are held at a time.

    Raises:
        ValueError: fewer than two tokens, or chunks of none.
        TypeError: ids are no integer tensor.
        NotImplementedError: the model treats its logits in a way that is not known here.
    """
    hidden = hidden_states(model, ids)
    ids = ids.to(hidden.device)
    parts = [
        nn.functional.cross_entropy(x, y, reduction="none")
        for x, y in zip(logits(model, hidden[:-1], chunk), ids[1:].split(chunk), strict=True)
    ]
    return Perplexity(torch.cat(parts).cpu())


def hidden_states(model: nn.Module, ids: Int[Tensor, " n"]) -> Float[Tensor, "n C"]:
    """What the output embedding reads; errors as `perplexity`."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"perplexity: ids must be a tensor of integers, got {getattr(ids, 'dtype', type(ids))}")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"perplexity: ids must be [n] with n >= 2, got {list(ids.shape)}")
    whole: Any = model
    for name, plain in _LOGITS.items():
        if getattr(whole.config, name, None) not in (None, plain):
            raise NotImplementedError(f"perplexity: {type(model).__name__} has {name}, which is not applied here")
    return whole.base_model(input_ids=ids.to(whole.device)[None], use_cache=False).last_hidden_state[0]


def logits(model: nn.Module, hidden: Float[Tensor, "n C"], chunk: int) -> Iterator[Float[Tensor, "c V"]]:
    """In float32, of so many tokens at a time."""
    if chunk < 1:
        raise ValueError(f"perplexity: chunk must be at least 1, got {chunk}")
    head = cast(Any, model).get_output_embeddings()
    return (head(x).float() for x in hidden.split(chunk))
