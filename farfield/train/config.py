"""How a model is trained, in plain values; devices and number formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from farfield.mechanism import check_plain
from farfield.nn.config import known

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FREE = (
    "out", "cache", "device", "compile", "graph", "log_every", "eval_every", "eval_windows", "save_every", "keep",
    "steps",
)  # fmt: skip
"""Fields that may differ between a run and its continuation; with other `steps` the schedule follows the new number."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run. JSON-able by to_dict and from_dict.

    Args:
        text: files, folders or globs to learn from; .gz, .bz2 and .xz are read through.
        valid: held-out text of the same kinds; None: the last `held_out` share of the text.
        held_out: share of the text held out where `valid` is None.
        tokenizer: a `tokenizers` JSON file; None: bytes.
        cache: folder of memory-mapped tokens; None: the user's cache folder.
        tokens: sequence length n.
        batch: sequences a forward.
        accumulate: forwards a step; gradients are averaged over batch * accumulate sequences.
        steps: optimizer steps.
        optimizer: "muon" (Muon on the blocks' matrices, AdamW on the rest) or "adamw".
        lr: of the blocks' matrices; None: 0.01 for Muon, 0.001 for AdamW.
        rest_lr: of everything else; None: 0.003 for Muon, `lr` for AdamW.
        weight_decay: of the blocks' matrices; nothing else decays.
        warmup: steps of linear warm-up.
        schedule: after warm-up "linear" (flat, then linear to 0), "cosine" (to 0) or "constant".
        decay: share of the steps that the linear schedule decays over.
        clip: largest gradient norm; 0 for none.
        auxiliary: weight of what mechanisms minimize themselves (Mechanism.auxiliary: FMA's learned score), which is
            added to the loss that is minimized, not to the one that is told; 0: not at all.
        mask_share: share of the tokens hidden from an encoder.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        compile: torch.compile the blocks, all of them but the mechanisms.
        graph: on an NVIDIA GPU, take a step as one CUDA graph: without it a step of many small kernels waits for the
            host.
        seed: of weights, order of data and dropout.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        out: run folder: checkpoints and log.jsonl.
        log_every, eval_every, save_every: in steps; 0: at the end only.
        eval_windows: held-out windows of each evaluation.
        keep: checkpoints kept.
    """

    text: str | Path | Sequence[str | Path] = ()
    valid: str | Path | Sequence[str | Path] | None = None
    held_out: float = 0.05
    tokenizer: str | Path | None = None
    cache: str | Path | None = None
    tokens: int = 2048
    batch: int = 8
    accumulate: int = 1
    steps: int = 1000
    optimizer: str = "muon"
    lr: float | None = None
    rest_lr: float | None = None
    weight_decay: float = 0.1
    warmup: int = 100
    schedule: str = "linear"
    decay: float = 0.6
    clip: float = 1.0
    auxiliary: float = 0.0
    mask_share: float = 0.15
    dtype: str = "float32"
    compile: bool = False
    graph: bool = False
    seed: int = 0
    device: str = "auto"
    out: str | Path = "runs/farfield"
    log_every: int = 10
    eval_every: int = 250
    eval_windows: int = 16
    save_every: int = 250
    keep: int = 2

    def __post_init__(self):
        for f in fields(self):
            check_plain("TrainConfig", f.name, f.type, getattr(self, f.name))
        for name in ("text", "valid"):
            value = getattr(self, name)
            if isinstance(value, str | Path):
                value = (value,)
            if value is not None:
                object.__setattr__(self, name, tuple(str(v) for v in value))
        for name in ("tokenizer", "cache", "out"):
            if isinstance(value := getattr(self, name), Path):
                object.__setattr__(self, name, str(value))
        least = {"tokens": 1, "batch": 1, "accumulate": 1, "steps": 1, "eval_windows": 1, "keep": 1}
        least |= dict.fromkeys(("warmup", "log_every", "eval_every", "save_every", "seed"), 0)
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"TrainConfig: {name} must be a whole number of at least {low}, got {value}")
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("dtype", tuple(DTYPES))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"TrainConfig: {name} must be one of {', '.join(allowed)}; got {value!r}")
        for name in ("held_out", "decay", "mask_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"TrainConfig: {name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("lr", "rest_lr", "clip", "weight_decay", "auxiliary"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"TrainConfig: {name} must not be negative, got {value}")

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the blocks' matrices and of the rest."""
        muon = self.optimizer == "muon"
        lr = self.lr if self.lr is not None else (0.01 if muon else 0.001)
        rest = self.rest_lr if self.rest_lr is not None else (0.003 if muon else lr)
        return lr, rest

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config of `values`; a field left out takes its default, a name that is no field is refused."""
        return cls(**known(cls, values))


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here; the message lists those that there are.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if mps else [])]
        raise ValueError(f"device {str(name)!r}: no such device here; there is {', '.join(there)}") from None
    return device


def autocast(device: torch.device, dtype: str):
    """The context in which forwards run: mixed precision for "bfloat16", nothing for "float32"."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])
