"""A decoder language model and a masked-language-model encoder over any mechanism."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from farfield.mechanism import Mechanism, State
from farfield.nn.block import Block, BlockRing
from farfield.nn.config import ModelConfig
from farfield.nn.layer import Attention, LayerState
from farfield.ops.token_step import normed
from farfield.token_ring import reorder_

IGNORE = -100  # a target that does not count, as in F.cross_entropy
LOGITS = 1 << 23  # logits alive at a time in `loss`


@dataclass(frozen=True)
class DecoderState(State):
    """What a Decoder remembers: the state of each layer."""

    layers: tuple[LayerState, ...]

    def crop(self, drop: int) -> DecoderState:
        return DecoderState(self.left(drop), tuple(layer.crop(drop) for layer in self.layers))


@dataclass(frozen=True)
class DecoderRing:
    """What a Decoder remembers, in buffers of fixed size: those of each layer, and a clock for each sequence.

    `Decoder.ring` makes one of a state. Changed in place by `Decoder.step` and `reorder_`. Beside the buffers are the
    weights of products as they were when it was made.
    """

    blocks: tuple[BlockRing, ...]
    clock: Int[Tensor, "B 1"]
    output: Tensor  # the output layer's weights

    @property
    def tokens(self) -> Int[Tensor, " B"]:
        """Tokens of each sequence so far, on the device."""
        return self.clock[:, 0]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in self.tensors().values())

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: nothing in it waits for the host."""
        return all(block.layer.inner.capturable for block in self.blocks)

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer under its name."""
        blocks = enumerate(self.blocks)
        found = {f"layers.{i}.{name}": x for i, block in blocks for name, x in block.layer.tensors().items()}
        return {**found, "clock": self.clock}

    def reorder_(self, beams: Int[Tensor, " B"]) -> None:
        """Sequence i becomes sequence beams[i], in place, for as many beams as there are sequences."""
        layers = [block.layer for block in self.blocks]
        for layer in layers:
            layer.inner.reorder_(beams)
        reorder_((self.clock, *(layer.recent for layer in layers if layer.recent is not None)), beams)


class Transformer(nn.Module):
    """What decoder and encoder share: embedding, blocks, final norm, output layer, loss."""

    causal: bool

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(
            Block(self._attention(n), mlp_ratio=config.mlp_ratio, dropout=config.dropout) for n in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = None if config.tie else nn.Linear(config.width, config.vocab, bias=False)
        self.reset_parameters()

    def _attention(self, number: int) -> Attention:
        c = self.config
        other = c.other is not None and (number + 1) % c.every == 0
        rope_share = c.other_rope_share if other and c.other_rope_share is not None else c.rope_share
        log_scale = c.other_log_scale if other and c.other_log_scale is not None else c.log_scale
        return Attention(
            c.width,
            c.heads,
            kv_heads=c.kv_heads,
            mechanism=c.other if other and c.other else c.attention,
            options=c.other_options if other else c.attention_options,
            causal=self.causal,
            conv=c.conv,
            rope_share=rope_share,
            rope_base=c.rope_base,
            log_scale=log_scale,
            qk_norm=c.qk_norm,
            rotate=c.rotate,
        )

    def reset_parameters(self) -> None:
        """Matrices keep unit RMS; the two that write to the stream start smaller, so that depth does not add up.

        Mechanisms, convolutions and norms keep the start that they gave themselves.
        """
        own = {m for mechanism in self.modules() if isinstance(mechanism, Mechanism) for m in mechanism.modules()}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module not in own:
                std = module.in_features**-0.5
                if name.endswith((".out", ".down")):
                    std *= (2 * self.config.layers) ** -0.5
                nn.init.normal_(module.weight, std=std)
        nn.init.normal_(self.embed.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    def rows_read(self, tokens: int) -> float | None:
        """Rows that enter a query's softmax, on average over the queries and the blocks; None where one is a scan."""
        found = [cast(Block, block).attention.mechanism.rows_read(tokens) for block in self.blocks]
        rows = [x for x in found if x is not None]
        return sum(rows) / len(rows) if len(rows) == len(found) else None

    @property
    def output_weight(self) -> Float[Tensor, "V W"]:
        """The output layer's matrix; the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def teach(self, on: bool = True) -> None:
        """From now on forwards with gradients make what `auxiliary` returns; of packed documents it is refused."""
        for block in self.blocks:
            cast(Block, block).attention.teaching = on

    def auxiliary(self) -> Tensor | None:
        """The sum of what the layers' mechanisms minimize themselves (Mechanism.auxiliary), once for each forward after
        `teach`; None where none does."""
        layers = [cast(Block, block).attention for block in self.blocks]
        found: list[Tensor] = [layer.taught for layer in layers if layer.taught is not None]
        for layer in layers:
            layer.taught = None
        return torch.stack(found).sum() if found else None

    def _embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T W"]:
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: tokens must be integers [batch, tokens], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            least, most = tokens.aminmax()
            if least < 0 or most >= self.config.vocab:
                raise ValueError(
                    f"{type(self).__name__}: tokens must lie below vocab={self.config.vocab} and not below 0, "
                    f"got {int(least)}..{int(most)}"
                )
        # at unit RMS the blocks weigh against it from the first step, however small a tied embedding is
        return F.rms_norm(self.embed(tokens), (self.config.width,), eps=1e-6)

    def features(self, tokens: Int[Tensor, "B T"], group: Int[Tensor, "#B T"] | None = None) -> Float[Tensor, "B T W"]:
        """The normed residual stream that the output layer reads."""
        x = self._embed(tokens)
        if group is not None and (
            group.dim() != 2 or group.shape[0] not in (1, len(x)) or group.shape[1] != x.shape[1]
        ):
            raise ValueError(
                f"{type(self).__name__}: group must be [B, T] = {list(tokens.shape)}, or one row for all, "
                f"got {list(group.shape)}"
            )
        again = self.config.checkpoint and torch.is_grad_enabled()
        for block in self.blocks:
            if again:
                x = checkpoint(block, x, group, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
            else:
                x = block(x, group)
        return self.norm(x)

    def forward(self, tokens: Int[Tensor, "B T"], group: Int[Tensor, "#B T"] | None = None) -> Float[Tensor, "B T V"]:
        """Logits of every token. `group`: documents of a packed or padded batch, as in Mechanism.forward."""
        return F.linear(self.features(tokens, group), self.output_weight)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        group: Int[Tensor, "#B T"] | None = None,
        *,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Cross-entropy in nats; targets of -100 do not count.

        The vocabulary's logits are made for a piece of the tokens at a time and made again in backward, so they
        take no memory that grows with the length.

        Args:
            reduction: "mean" over the targets that count, or "none": [B, T], 0 where one does not count.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"{type(self).__name__}: targets must have the shape of tokens, {list(tokens.shape)}, "
                f"got {list(targets.shape)}"
            )
        x, flat = self.features(tokens, group).flatten(0, 1), targets.flatten()
        piece = max(1, LOGITS // self.config.vocab)
        if len(flat) <= piece:
            nats = _cross_entropy(x, self.output_weight, flat)
        else:
            nats = torch.cat([
                checkpoint(_cross_entropy, a, self.output_weight, b, use_reentrant=False, preserve_rng_state=False)
                for a, b in zip(x.split(piece), flat.split(piece), strict=True)
            ])  # fmt: skip
        if reduction == "none":
            return nats.view_as(targets)
        return nats.sum() / (flat != IGNORE).sum().clamp(min=1)


def _cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


class Decoder(Transformer):
    """A causal language model: each token's logits are those of the next token."""

    causal = True

    def __init__(self, config: ModelConfig):
        super().__init__(replace(config, kind="decoder"))

    def extend(
        self, tokens: Int[Tensor, "B T"], state: DecoderState | None = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B L V"], DecoderState]:
        """Logits of T further tokens after those in `state`: the logits of one forward over everything.

        `state` stays valid and unchanged. With `last`, only the last token's logits are made: [B, 1, V].
        """
        if not tokens.shape[-1]:
            raise ValueError("Decoder: extend needs at least one token")
        x, layers = self._embed(tokens), []
        for i, block in enumerate(self.blocks):
            x, layer = cast(Block, block).extend(x, state.layers[i] if state else None)
            layers.append(layer)
        if last:
            x = x[:, -1:]
        seen = (state.tokens if state else 0) + tokens.shape[1]
        return F.linear(self.norm(x), self.output_weight), DecoderState(seen, tuple(layers))

    @torch.no_grad()
    def ring(self, state: DecoderState, *, capacity: int, dtype: torch.dtype | None = None) -> DecoderRing:
        """The fixed buffers that go on where `state` stands, for sequences of up to `capacity` tokens.

        Args:
            dtype: of products, as autocast has it; the state's mechanisms were given this one. Default the weights'.

        Raises:
            ValueError: the state has more tokens than `capacity`, or a mechanism cannot hold as many.
            NotImplementedError: a layer's mechanism has no such buffers; `extend` decodes.
        """
        blocks = [
            cast(Block, block).ring(layer, capacity=capacity, dtype=dtype)
            for block, layer in zip(self.blocks, state.layers, strict=True)
        ]
        first = next(iter(state.tensors().values()))
        clock = torch.full((len(first), 1), state.tokens, dtype=torch.long, device=first.device)
        return DecoderRing(tuple(blocks), clock, self.output_weight.detach().to(dtype))

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "B 1"], ring: DecoderRing) -> Float[Tensor, "B 1 V"]:
        """`extend` by one token a sequence, in place and without dropout or gradients: what a CUDA graph captures."""
        if tokens.shape != ring.clock.shape:
            raise ValueError(f"Decoder: step takes tokens {list(ring.clock.shape)}, got {list(tokens.shape)}")
        x, more = self._embed(tokens), None
        for block, held in zip(self.blocks, ring.blocks, strict=True):
            x, more = cast(Block, block).step(x, more, held, ring.clock)
        ring.clock.add_(1)
        _, x = normed(x, more, self.norm.weight, cast(float, self.norm.eps), ring.output.dtype)
        return F.linear(x, ring.output)


class Encoder(Transformer):
    """A masked language model: every token sees the whole document; logits are those of the token itself.

    The last id of the vocabulary is the mask token, so bytes need vocab=257.
    """

    causal = False

    def __init__(self, config: ModelConfig):
        if config.vocab < 3:
            raise ValueError(f"Encoder: vocab must be at least 3, the last id is the mask token; got {config.vocab}")
        super().__init__(replace(config, kind="encoder"))

    @property
    def mask_token(self) -> int:
        return self.config.vocab - 1

    def corrupt(
        self, tokens: Int[Tensor, "B T"], *, share: float = 0.15, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Hide a share of the tokens for training: 80 % of them become the mask token, 10 % another token, 10 % stay.

        Drawn on the CPU, so that a seed means the same on every device.

        Returns:
            the corrupted tokens, and targets that are -100 wherever nothing was chosen.
        """
        if not 0 < share <= 1:
            raise ValueError(f"Encoder: share of hidden tokens must lie in 0..1, above 0, got {share}")
        chosen, how = torch.rand(2, *tokens.shape, generator=generator).to(tokens.device)
        other = torch.randint(self.mask_token, tokens.shape, generator=generator).to(tokens)
        chosen = chosen < share
        hidden = torch.where(how < 0.8, self.mask_token, torch.where(how < 0.9, other, tokens))
        return torch.where(chosen, hidden, tokens), torch.where(chosen, tokens, IGNORE)


def build(config: ModelConfig) -> Decoder | Encoder:
    """The model that `config` describes, with fresh weights."""
    return Decoder(config) if config.kind == "decoder" else Encoder(config)
