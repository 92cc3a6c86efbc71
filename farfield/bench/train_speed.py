"""Training a language model: the step's speed and memory with FMA and with full attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from farfield.bench.runner import STEP, Work, bench

STEP_TOKENS = 1 << 18  # of a step, whatever the length; one sequence where that is longer


@bench(
    "train-speed",
    over={"tokens": [1 << 12, 1 << 15, 1 << 18]},
    against=("full",),
    dtypes=["bfloat16"],
    passes=STEP,
)
def train_speed(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    block: int = 64,
    near: int = 128,
    rank: int = 16,
    checkpoint: bool = False,
    step_tokens: int = STEP_TOKENS,
) -> Work:
    """A training step of a 12-layer language model on 262,144 tokens: forward, backward, AdamW; blocks compiled."""
    shape: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "checkpoint": checkpoint}
    batch = max(1, step_tokens // tokens)
    options = {"block": block, "near": near, "rank": rank}

    def work(attention: str, attention_options: Mapping[str, int]) -> Work:
        config = {**shape, "attention": attention, "attention_options": attention_options}
        call, used = training_step(config, batch, tokens, device, dtype)
        return Work(
            call=call,
            backend=used,
            rates=lambda passes, seconds, _: {"tokens/s": batch * tokens / seconds, "batch": batch},
        )

    return replace(work("fma", options), rivals={"full": lambda: work("full", {})})


def training_step(
    config: Mapping[str, Any], batch: int, tokens: int, device: torch.device | str, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], str]:
    """A call that trains the model one step further and returns the loss; and the back-end of its full attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from farfield.nn import Decoder, ModelConfig

    torch.manual_seed(0)
    cuda = torch.device(device).type == "cuda"
    model = Decoder(ModelConfig(**config)).to(device, dtype)
    for block in model.blocks:
        # one block's code serves all of them
        block.compile(fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    text = torch.randint(256, (batch, tokens + 1), device=device)
    named = cuda and config["attention"] == "full"

    def step() -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if named else nullcontext():
            loss = model.loss(text[:, :-1], text[:, 1:])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    # compiled before the clock starts
    with torch._dynamo.config.patch(recompile_limit=64):
        step()
    return step, "cudnn_attention" if named else ""
