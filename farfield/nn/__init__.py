"""Layers and models: an attention layer over any mechanism, a block, a decoder and an encoder."""

from farfield.nn.block import MLP, Block
from farfield.nn.config import ModelConfig
from farfield.nn.conv import ShortConv
from farfield.nn.layer import Attention, LayerRing, LayerState
from farfield.nn.models import Decoder, DecoderRing, DecoderState, Encoder, build
from farfield.nn.rope import Rope

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Decoder",
    "DecoderRing",
    "DecoderState",
    "Encoder",
    "LayerRing",
    "LayerState",
    "ModelConfig",
    "Rope",
    "ShortConv",
    "build",
]
