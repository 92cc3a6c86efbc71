"""Perplexity of a causal language model on one long window, all tokens at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"perplexity: ids must be [n] with n >= 2, got {list(ids.shape)}")
    whole: Any = model
    for name, plain in _LOGITS.items():
        if getattr(whole.config, name, None) not in (None, plain):
            raise NotImplementedError(f"perplexity: {type(model).__name__} has {name}, which is not applied here")
    head = whole.get_output_embeddings()
    ids = ids.to(whole.device)
    hidden = whole.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    parts = [
        nn.functional.cross_entropy(head(x).float(), y, reduction="none")
        for x, y in zip(hidden.split(chunk), ids[1:].split(chunk), strict=True)
    ]
    return Perplexity(torch.cat(parts).cpu())
