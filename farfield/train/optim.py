"""Muon for the matrices of the blocks, AdamW for the rest, and what the learning rate does over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from farfield.mechanism import Mechanism
from farfield.nn.models import Transformer
from farfield.train.config import TrainConfig


def split_parameters(model: Transformer) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Matrices of the blocks' linear layers, and everything else, by name.

    Everything else: embedding, output layer, norms, gains, convolutions, and whatever a mechanism learns.
    """
    within = {m for mechanism in model.modules() if isinstance(mechanism, Mechanism) for m in mechanism.modules()}
    linear = (m for m in model.blocks.modules() if isinstance(m, nn.Linear) and m not in within)
    matrices = {id(m.weight) for m in linear}
    named = dict(model.named_parameters())
    return (
        {name: p for name, p in named.items() if id(p) in matrices},
        {name: p for name, p in named.items() if id(p) not in matrices},
    )


def rate(step: int, config: TrainConfig) -> float:
    """What the learning rates are multiplied by at `step`, counted from 0."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    left = (config.steps - step) / config.steps
    match config.schedule:
        case "linear":
            return min(warm, left / config.decay)
        case "cosine":
            return min(warm, 0.5 - 0.5 * math.cos(math.pi * left))
        case _:
            return warm


class PlainMuon(torch.optim.Muon):
    """torch.optim.Muon with its Newton-Schulz iteration in the parameters' own dtype instead of bfloat16.

    For CPUs: one without bfloat16 arithmetic spends hundreds of times as long on a bfloat16 product.

        X <- a X + (b A + c A A) X,    A = X X',    from X = momentum / its norm
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rows, columns = p.shape
                p.add_(_orthogonal(update, group), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
        return loss


class StackedMuon(torch.optim.Muon):
    """torch.optim.Muon with the matrices of one size in one batched product: for GPUs, where a small model's many small
    products would cost more in launches than in arithmetic. Tall and wide matrices of the same sizes go together."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            owners = [p for p in group["params"] if p.grad is not None]
            if not owners:
                continue
            grads = [p.grad for p in owners]
            for p in owners:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            updates = buffers = [self.state[p]["momentum_buffer"] for p in owners]
            foreach: Any = torch  # its lists of tensors have no public names
            foreach._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            if group["nesterov"]:
                updates = foreach._foreach_lerp(grads, buffers, group["momentum"])
            foreach._foreach_mul_(owners, 1 - group["lr"] * group["weight_decay"])
            alike: dict[tuple[int, ...], list[int]] = {}
            for at, p in enumerate(owners):
                alike.setdefault(tuple(sorted(p.shape)), []).append(at)
            for sizes, members in alike.items():
                wide = [updates[at] if updates[at].shape == sizes else updates[at].T for at in members]
                turned = _orthogonal(torch.stack(wide).bfloat16(), group)
                for at, x in zip(members, turned, strict=True):
                    p = owners[at]
                    factor = -group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.add_((x if p.shape == sizes else x.T).to(p.dtype) * factor)
        return loss


def _orthogonal(x: Tensor, group: Mapping) -> Tensor:
    """Newton-Schulz on one matrix or on a stack of them."""
    a, b, c = group["ns_coefficients"]
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
    times = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = times(x, times(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizers:
    """One or two optimizers that step as one. Their state is kept by parameter name.

    Muon updates are orthogonalised momentum, scaled by sqrt(max(1, rows / columns)): a learning rate is then a share
    of a matrix's spectral norm, whatever its shape.
    """

    def __init__(self, model: Transformer, config: TrainConfig):
        matrices, rest = split_parameters(model)
        lr, rest_lr = config.rates
        decay, device = config.weight_decay, next(model.parameters()).device
        fused = device.type == "cuda"
        if config.optimizer == "muon":
            kind = {"cpu": PlainMuon, "cuda": StackedMuon}.get(device.type, torch.optim.Muon)
            muon = kind(matrices.values(), lr=lr, weight_decay=decay, momentum=0.95, nesterov=True)
            adamw = torch.optim.AdamW(rest.values(), lr=rest_lr, weight_decay=0.0, betas=(0.9, 0.95), fused=fused)
            self.inner: list[torch.optim.Optimizer] = [muon, adamw]
        else:
            groups = [
                {"params": list(matrices.values()), "lr": lr, "weight_decay": decay},
                {"params": list(rest.values()), "lr": rest_lr, "weight_decay": 0.0},
            ]
            self.inner = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)]
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        for group in self._groups():
            group["full_lr"] = group["lr"]

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    def scale(self, factor: float) -> None:
        """Set every learning rate to `factor` of its full value."""
        for group in self._groups():
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(factor * group["full_lr"])
            else:
                group["lr"] = factor * group["full_lr"]

    def capturable(self) -> None:
        """From now on nothing that a step reads is held by the host: a CUDA graph of it follows the learning rate."""
        for group in self._groups():
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
            group["capturable"] = True

    def step(self) -> None:
        for optimizer in self.inner:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state: "parameter name:kind" -> tensor."""
        return {
            f"{self.names[p]}:{kind}": x
            for optimizer in self.inner
            for p, kinds in optimizer.state.items()
            for kind, x in kinds.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the state that `tensors` gave.

        Raises:
            ValueError: the state is of another model or optimizer.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for name, x in tensors.items():
            parameter, _, kind = name.rpartition(":")
            states.setdefault(parameter, {})[kind] = x
        if extra := states.keys() - set(self.names.values()):
            raise ValueError(
                f"optimizer state of parameters that the model does not have: {', '.join(sorted(extra)[:3])}"
            )
        for optimizer in self.inner:
            expected = (
                {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
            )
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                state = states.get(self.names[p], {})
                if state and state.keys() != expected:
                    raise ValueError(f"optimizer state of {self.names[p]} is of another optimizer: {sorted(state)}")
                if any(x.shape != p.shape for kind, x in state.items() if kind != "step"):
                    raise ValueError(f"optimizer state of {self.names[p]} has another shape than the parameter")
                if state:
                    # AdamW counts in float32, on the CPU unless it is fused
                    count = p.device if optimizer.defaults.get("fused") else "cpu"
                    optimizer.state[p] = {k: x.clone().to(count) if k == "step" else x.to(p) for k, x in state.items()}
