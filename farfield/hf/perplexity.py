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
        """The perplexity of all tokens, or of the last ones."""
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
        ValueError: fewer than two tokens.
        NotImplementedError: the model treats its logits in a way that is not known here.
    """
    ids = ids.to(next(model.parameters()).device)
    parts = [
        nn.functional.cross_entropy(x, y, reduction="none")
        for x, y in zip(logits(model, hidden_states(model, ids)[:-1], chunk), ids[1:].split(chunk), strict=True)
    ]
    return Perplexity(torch.cat(parts).cpu())


def hidden_states(model: nn.Module, ids: Int[Tensor, " n"]) -> Float[Tensor, "n C"]:
    """What the output embedding reads; errors as `perplexity`."""
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"perplexity: ids must be [n] with n >= 2, got {list(ids.shape)}")
    whole: Any = model
    for name, plain in _LOGITS.items():
        if getattr(whole.config, name, None) not in (None, plain):
            raise NotImplementedError(f"perplexity: {type(model).__name__} has {name}, which is not applied here")
    return whole.base_model(input_ids=ids.to(whole.device)[None], use_cache=False).last_hidden_state[0]


def logits(model: nn.Module, hidden: Float[Tensor, "n C"], chunk: int) -> Iterator[Float[Tensor, "c V"]]:
    """In float32, of so many tokens at a time."""
    head = cast(Any, model).get_output_embeddings()
    return (head(x).float() for x in hidden.split(chunk))
