"""use: the attention of a loaded model becomes a mechanism of farfield, in all layers or in some.

Transformers asks two registries by the name of a model's attention implementation: one for the attention function, one
for what the mask of a forward is made into. Without an entry in the second, padding is ignored without a word; both
are made here, once, under `NAME`.

The attention function gets queries and keys after the rotation to their positions. Mechanisms that could place
rotations themselves therefore summarize rotated keys: FMA then averages keys of different phases, where its own models
average first and rotate the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from farfield import mechanisms
from farfield.mechanism import Mechanism

NAME = "farfield"
"""What `attn_implementation` is called."""

Choice = str | tuple[str, Mapping[str, Any]] | Mechanism
"""A registry name, one with options, or a mechanism made already."""

# arguments of some models' attention that change what is computed
_REFUSED = (
    "sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "cache", "block_table",
    "encoder_hidden_states",
)  # fmt: skip


def use(
    model: nn.Module,
    mechanism: Choice = "fma",
    options: Mapping[str, Any] | None = None,
    *,
    layers: Mapping[int, Choice] | Sequence[Choice] | None = None,
) -> nn.Module:
    """Let every self-attention of `model` compute `mechanism`; the weights stay as they are.

    A forward takes whole sequences: a cache that already holds tokens is refused, so `generate` needs
    `use_cache=False`. Padding (a 2-D attention_mask, one run of tokens a row) is honoured by mechanisms that can pack,
    and refused by the others. `model.set_attn_implementation("sdpa")` undoes it.

    Args:
        model: a PreTrainedModel whose attention goes through Transformers' AttentionInterface.
        mechanism: of all layers that `layers` does not name.
        options: of `mechanism`, if that is a name.
        layers: {number: mechanism}, negative numbers from the last layer; or one mechanism for each layer.

    Returns:
        The model.

    Raises:
        ImportError: Transformers is missing or older than 5.
        ValueError: no attention that could be replaced, no such layer, no such mechanism or option.
        TypeError: no model, or no choice of a mechanism.
    """
    _register()
    found = attentions(model)
    if options and not isinstance(mechanism, str):
        raise ValueError("use: options belong to a mechanism's name; this one is made already")
    default: Choice = (mechanism, options or {}) if isinstance(mechanism, str) else mechanism
    made = [_make(choice, *each) for choice, each in zip(_choices(default, layers, len(found)), found, strict=True)]
    for (_, module), one in zip(found, made, strict=True):
        module.add_module(NAME, one)
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    return model


def in_use(model: nn.Module) -> list[Mechanism]:
    """The mechanism of each layer, in the order of the model.

    Raises:
        ValueError: `use` was not called on this model.
    """
    modules = [module for _, module in attentions(model)]
    found = [x.get_submodule(NAME) for x in modules if NAME in dict(x.named_children()) and _asked_for(x) == NAME]
    if not found:
        raise ValueError(f"in_use: {type(model).__name__} has no mechanism of farfield; call farfield.hf.use first")
    return [x for x in found if isinstance(x, Mechanism)]


def _asked_for(module: nn.Module) -> str | None:
    """The attention implementation of this module's model."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "farfield.hf needs Transformers 5 or newer: pip install 'transformers>=5'", name="transformers"
        ) from error
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The self-attentions, in order: modules that tell whether they are causal, as the interface asks them to."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"use: model must be a loaded PreTrainedModel, got {model!r}")
    found = [(name, x) for name, x in model.named_modules() if hasattr(x, "is_causal") and hasattr(x, "scaling")]
    if not found or not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            f"use: {type(model).__name__} has no attention that goes through Transformers' AttentionInterface"
        )
    return found


def _choices(default: Choice, layers: Mapping[int, Choice] | Sequence[Choice] | None, count: int) -> list[Choice]:
    if layers is None:
        layers = {}
    if not isinstance(layers, Mapping):
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise TypeError(
                f"use: layers must be {{number: mechanism}} or one mechanism for each layer, got {layers!r}"
            )
        if len(layers) != count:
            raise ValueError(f"use: the model has {count} layers, and layers names {len(layers)} mechanisms")
        return list(layers)
    chosen = [default] * count
    for at, choice in layers.items():
        if not isinstance(at, Integral) or not -count <= at < count:
            raise ValueError(f"use: no layer {at!r}; the model has {count}, numbered from 0 or from -1 backwards")
        chosen[at] = choice
    return chosen


def _make(choice: Choice, name: str, module: nn.Module) -> Mechanism:
    """The mechanism of this attention module."""
    causal, scale = bool(module.is_causal), float(module.scaling)  # pyright: ignore[reportArgumentType]
    if isinstance(choice, Mechanism):
        width = getattr(module, "head_dim", None)
        own = choice.scale if choice.scale is not None or width is None else width**-0.5
        if choice.causal != causal or (own is not None and not math.isclose(own, scale)):
            raise ValueError(
                f"use: {name} computes causal={causal}, scale={scale}, but this {choice.name} was built with "
                f"causal={choice.causal}, scale={choice.scale}"
            )
        return choice
    kind, options = (choice, {}) if isinstance(choice, str) else _pair(choice)
    if clash := {"causal", "scale"} & options.keys():
        raise ValueError(f"use: {' and '.join(sorted(clash))} come from the model; leave them out of the options")
    config: Any = module.config
    heads = config.num_attention_heads
    width = getattr(module, "head_dim", None) or config.hidden_size // heads
    kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    options = {"causal": causal, "scale": scale, **options}
    made = mechanisms.make_for(kind, options, heads=heads, kv_heads=kv_heads, width=width)
    weight = next(module.parameters(), None)
    return made if weight is None else made.to(weight.device)


def _pair(choice: Any) -> tuple[str, Mapping[str, Any]]:
    match choice:
        case (str(name), Mapping() as options):
            return name, options
    raise TypeError(
        f"use: a mechanism is a name, (name, {{option: value}}) or a built Mechanism such as FMA(), got {choice!r}"
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls: q [B, H, T, D], k and v [B, G, T, D] to [B, T, H, D]; the mask is `_mask`'s."""
    mechanism = getattr(module, NAME, None)
    if not isinstance(mechanism, Mechanism):
        raise ValueError(f"farfield: {type(module).__name__} was given no mechanism; call farfield.hf.use(model, ...)")
    asked = {name: others[name] for name in _REFUSED if others.get(name) is not None}
    asked |= {"dropout": dropout} if dropout else {}
    asked |= {"output_attentions": True} if others.get("output_attentions") else {}
    if asked:
        raise NotImplementedError(f"farfield: {mechanism.name} cannot honour the model's {', '.join(asked)}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = mechanism.scale
    other = scaling is not None and scale is not None and not math.isclose(scaling, scale)
    if causal != mechanism.causal or other:
        raise ValueError(
            f"farfield: the model asks for causal={causal}, scale={scaling}, but its {mechanism.name} was built with "
            f"causal={mechanism.causal}, scale={mechanism.scale}"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"farfield: {mechanism.name} takes no mask of {attention_mask.dim()} dimensions; give the 2-D padding mask"
        )
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(_CACHED)
    out = mechanism(query, key, value, group=attention_mask)
    return out.transpose(1, 2).contiguous(), None


_CACHED = (
    "farfield: no cache yet: a forward takes whole sequences, but here queries go on after keys that a cache holds. "
    "Call the model on all tokens, or generate with use_cache=False"
)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """What Transformers makes of a forward's mask: None without padding, else [B, T]: 0 for tokens, -1 for padding."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        raise NotImplementedError(
            "farfield: the model asks for a mask other than causal or none at all: a sliding window, chunks, or packed "
            "sequences told by position_ids. Such layers cannot be replaced; pad sequences instead of packing them"
        )
    if q_length != kv_length or int(q_offset) or int(kv_offset):
        raise NotImplementedError(_CACHED)
    if attention_mask is None or bool(attention_mask.all()):
        return None
    there = attention_mask.bool()
    begins = there.long().diff(prepend=there.new_zeros(len(there), 1).long()).eq(1).sum(1)
    if bool((begins > 1).any()):
        raise NotImplementedError(
            "farfield: attention_mask may have padding at the ends only, but here it has holes between tokens"
        )
    return there.long() - 1
