"""Generating with a model: a token from fixed buffers as a CUDA graph, against steps, states and full attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from farfield.bench.runner import STEP, Work, bench

if TYPE_CHECKING:
    from farfield.nn import Decoder, DecoderRing, DecoderState
    from farfield.nn.block import BlockRing

SPARE = 4096  # tokens that are generated before the ring is set back
CHUNK = 1 << 14  # tokens of a prefill at a time
OPENED = {"block": 64, "near": 128, "rank": 4, "open": 16, "beam": 32}
MODELS: dict[str, dict[str, Any]] = {
    "fma": {"attention": "fma"},
    # two layers of eight open groups and carry no positions, the others see what is near
    "mixed": {
        "attention": "near-field", "other": "fma", "other_options": OPENED, "every": 4, "other_rope_share": 0.0,
    },
}  # fmt: skip
SAMPLING = 0.8, None, 0.95  # temperature, top_k, top_p


@bench(
    "generate",
    over={"tokens": [1 << 13, 1 << 16], "model": list(MODELS)},
    against=("extend", "steps", "full", "full-cudnn", "full-flash"),
    dtypes=["bfloat16"],
    passes=STEP,
)
def generate(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    model: str = "fma",
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
) -> Work:
    """A token of a 12-layer language model after n tokens, draw included, against that of full attention."""
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    shape = {"layers": layers, "width": width, "heads": heads}
    mine, state, logits = prefilled({**shape, **MODELS[model]}, tokens, device, name)
    ring = mine.ring(state, capacity=tokens + SPARE, dtype=dtype)

    def full(backend: str = "") -> Work:
        other, seen, last = prefilled({**shape, "attention": "full"}, tokens, device, name)
        held = other.ring(seen, capacity=tokens + SPARE, dtype=dtype)
        if backend:
            pairs = zip(held.blocks, seen.layers, strict=True)
            held = replace(held, blocks=tuple(_through_sdpa(a, b.inner, backend) for a, b in pairs))
        return _work(Repeated(other, held, last), backend)

    def eager() -> Work:
        return _work(Repeated(mine, mine.ring(state, capacity=tokens + SPARE, dtype=dtype), logits, graph=False))

    def extend() -> Work:
        return _work(Extended(mine, state, logits, name))

    def checked(passes: str) -> Mapping[str, Any]:
        # the same draws from rings of their own, by a graph and step by step
        runs = [
            Repeated(mine, mine.ring(state, capacity=tokens + 16, dtype=dtype), logits, graph)
            for graph in (True, False)
        ]
        first, second = ([int(run()) for _ in range(16)] for run in runs)
        assert first == second, f"a graph draws {first}, steps draw {second}"
        return {"tokens": len(first)}

    rivals: dict[str, Callable[[], Work]] = {
        "extend": extend, "steps": eager, "full": full,
        "full-cudnn": lambda: full("CUDNN_ATTENTION"), "full-flash": lambda: full("FLASH_ATTENTION"),
    }  # fmt: skip
    return replace(_work(Repeated(mine, ring, logits)), check=checked, rivals=rivals)


def _work(call: Repeated | Extended, backend: str = "") -> Work:
    return Work(
        call=call,
        backend=backend.lower(),
        rates=lambda passes, seconds, _: {"tokens/s": 1 / seconds, "state bytes": call.nbytes},
    )


def prefilled(
    shape: Mapping[str, Any], tokens: int, device: torch.device | str, dtype: str
) -> tuple[Decoder, DecoderState, Tensor]:
    """A model, its state after so many random tokens, and the logits of the last."""
    from farfield.nn import Decoder, ModelConfig
    from farfield.train.config import autocast

    torch.manual_seed(0)
    model = Decoder(ModelConfig(**shape)).to(device).eval()
    text, state = torch.randint(256, (1, tokens), device=device), None
    with torch.no_grad(), autocast(torch.device(device), dtype):
        for piece in text.split(CHUNK, 1):
            logits, state = model.extend(piece, state, last=True)
    assert state is not None
    return model, state, logits


class Extended:
    """A token from the same state each time."""

    def __init__(self, model: Decoder, state: DecoderState, logits: Tensor, dtype: str):
        from farfield.train.generate import Extending, Numbers

        self.state, self.nbytes = state, state.nbytes
        self.run = Extending(
            model, state, logits, SAMPLING, Numbers(torch.Generator().manual_seed(0), logits.device), dtype
        )
        self.run()

    def __call__(self) -> Tensor:
        self.run.state = self.state
        return self.run()


class Repeated:
    """Token after token from a ring, which is set back before it is full."""

    def __init__(self, model: Decoder, ring: DecoderRing, logits: Tensor, graph: bool = True):
        from farfield.train.generate import Numbers, Stepping

        self.ring, self.nbytes, self.calls = ring, ring.nbytes, 0
        self.begin = {name: x.clone() for name, x in ring.tensors().items()}
        self.run = Stepping(model, ring, logits, SAMPLING, Numbers(torch.Generator().manual_seed(0), logits.device))
        if not graph:
            self.run.captured = None

    def __call__(self) -> Tensor:
        if self.calls and self.calls % SPARE == 0:
            for name, x in self.ring.tensors().items():
                x.copy_(self.begin[name])
        self.calls += 1
        return self.run()


def _through_sdpa(block: BlockRing, cache: Any, backend: str) -> BlockRing:
    inner = _Sdpa(block.layer.inner.tokens, cache, backend)
    return replace(block, layer=replace(block.layer, inner=inner))


@dataclass(frozen=True)
class _Sdpa:
    """A plain cache of as many tokens as a prompt has: a step writes over the last one and reads all of them."""

    clock: Tensor
    cache: Any
    backend: str

    capturable = True

    @property
    def tokens(self) -> Tensor:
        return self.clock

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return self.cache.tensors()

    def reorder_(self, beams: Tensor) -> None:
        raise NotImplementedError("a baseline of one sequence")

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        self.cache.k[:, :, -1:], self.cache.v[:, :, -1:] = k, v
        with sdpa_kernel([getattr(SDPBackend, self.backend)]):
            return scaled_dot_product_attention(q, self.cache.k, self.cache.v, scale=scale)
