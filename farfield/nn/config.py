"""What a model is, in a dozen plain values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from farfield import mechanisms
from farfield.mechanism import check_plain

KINDS = ("decoder", "encoder")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Decoder or an Encoder. JSON-able by to_dict and from_dict.

    Args:
        vocab: number of token ids; 256 for bytes. An encoder's last id is its mask token: 257 for bytes.
        width: of the residual stream.
        layers: number of blocks.
        heads: query heads; width / heads is the head width.
        kv_heads: key/value heads, a divisor of heads; None: as many.
        attention: a mechanism's registry name.
        attention_options: that mechanism's options.
        other, other_options, every: every `every`-th block attends through `other` instead; None: no block does.
        rope_share, rope_base: rotary positions, see nn.Rope. Half of the width by default: with all of it rotated
            models learned to copy from afar late or never.
        other_rope_share: that of the `other` blocks; None: as rope_share. With 0 they carry no positions: the blocks
            below tell them what stands where.
        log_scale: tokens beyond which queries grow with the log of their position, see nn.Attention; 0: never.
        other_log_scale: that of the `other` blocks; None: as log_scale. Alone it leaves out blocks that read as many
            rows at any length.
        rotate: "mechanism" or "layer", see nn.Attention.
        qk_norm: unit-RMS q and k with a learned gain.
        conv: width of the short depthwise convolution before q, k and v; 0 for none. Centred in an encoder.
        mlp_ratio: hidden width of the MLP over width.
        tie: the output layer shares the embedding's weights.
        dropout: on what each half block adds.
        checkpoint: keep only each block's input for backward and make the rest again there.
        kind: "decoder" or "encoder"; set by the model class, and what `build` reads.
    """

    vocab: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    attention: str = "fma"
    attention_options: Mapping[str, Any] = field(default_factory=dict)
    other: str | None = None
    other_options: Mapping[str, Any] = field(default_factory=dict)
    every: int = 4
    rope_share: float = 0.5
    rope_base: float = 10_000.0
    other_rope_share: float | None = None
    log_scale: int = 0
    other_log_scale: int | None = None
    rotate: str = "mechanism"
    qk_norm: bool = True
    conv: int = 4
    mlp_ratio: float = 4.0
    tie: bool = True
    dropout: float = 0.0
    checkpoint: bool = False
    kind: str = "decoder"

    def __post_init__(self):
        for f in fields(self):
            check_plain("ModelConfig", f.name, f.type, getattr(self, f.name))
        least = {"vocab": 2, "width": 1, "layers": 1, "heads": 1, "conv": 0, "every": 1, "log_scale": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"ModelConfig: {name} must be a whole number of at least {low}, got {value}")
        if (n := self.other_log_scale) is not None and n < 0:
            raise ValueError(f"ModelConfig: other_log_scale must be None or a whole number of at least 0, got {n}")
        if self.width % self.heads:
            near = self.heads * max(1, round(self.width / self.heads))
            raise ValueError(
                f"ModelConfig: width must be a multiple of heads, got width={self.width} and heads={self.heads}; "
                f"width={near} would do"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"ModelConfig: kv_heads must divide heads={self.heads}, got {self.kv_heads}")
        for name in ("rope_share", "other_rope_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"ModelConfig: {name} must lie in 0..1, got {share}")
        if self.rotate not in ("mechanism", "layer"):
            raise ValueError(f'ModelConfig: rotate must be "mechanism" or "layer", got {self.rotate!r}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ModelConfig: dropout must lie in 0..1, below 1, got {self.dropout}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"ModelConfig: mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.kind not in KINDS:
            raise ValueError(f"ModelConfig: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("attention_options", "other_options"):
            if not isinstance(options := getattr(self, name), Mapping):
                raise ValueError(f"ModelConfig: {name} must be {{option: value}}, got {options!r}")
        for name in filter(None, (self.attention, self.other)):
            mechanisms.get(name)  # an unknown name is refused here, with suggestions

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config of `values`; a field left out takes its default.

        Raises:
            ValueError: a name that is no field, or a value out of range.
        """
        return cls(**known(cls, values))


def known(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values`, if every name is a field of the dataclass `cls`; else ValueError with the nearest name."""
    names = [f.name for f in fields(cls)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; fields are {', '.join(names)}"
            raise ValueError(f"{cls.__name__}: no field {name!r}{hint}")
    return values
