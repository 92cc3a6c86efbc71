"""Checkpoints: a folder a step, written under a temporary name and renamed when complete.

run/step-000250/model.safetensors      weights
                optimizer.safetensors  optimizer state, "parameter name:kind"
                state.json             format, version, step, configs, digest of the text, random states
                tokenizer.json         the tokenizer, where the model has one
"""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from farfield.nn import Decoder, Encoder, ModelConfig, build
from farfield.nn.config import known
from farfield.train.codec import Codec, Tokenizer, open_codec
from farfield.train.config import TrainConfig, pick_device
from farfield.train.optim import Optimizers

FORMAT = 1
MODEL, OPTIMIZER, STATE, TOKENIZER = "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """What state.json says.

    Args:
        path: the folder of the step.
        step: optimizer steps taken.
        model: shape of the model.
        train: how it is trained.
        digest: SHA-256 of the tokens that it learns from.
        version: of the library that wrote it.
        random: states of the random number generators.
    """

    path: Path
    step: int
    model: ModelConfig
    train: TrainConfig
    digest: str
    version: str
    random: Mapping[str, str]


def save(
    run: str | Path,
    step: int,
    model: Decoder | Encoder,
    optimizers: Optimizers,
    config: TrainConfig,
    *,
    digest: str = "",
    codec: Codec | None = None,
) -> Path:
    """Write a checkpoint and delete all but the last `config.keep`; returns its folder.

    The older ones are touched only once the new one is complete: a crash at any moment loses nothing.

    Raises:
        OSError: it cannot be written, because the disk is full for instance.
    """
    import farfield

    run = Path(run)
    final, partial = run / f"step-{step:06d}", run / f".partial-step-{step:06d}"
    state = {
        "format": FORMAT,
        "version": farfield.__version__,
        "torch": torch.__version__,
        "step": step,
        "model": model.config.to_dict(),
        "train": config.to_dict(),
        "digest": digest,
        "random": _random_states(),
    }
    if (final / STATE).exists():  # resumed and stopped again at once
        return final
    try:
        for left in run.glob(".partial-step-*"):  # of a crash
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, partial / MODEL)
        save_file({k: v.detach().contiguous() for k, v in optimizers.tensors().items()}, partial / OPTIMIZER)
        if isinstance(codec, Tokenizer):
            (partial / TOKENIZER).write_text(codec.source, encoding="utf-8")
        (partial / STATE).write_text(json.dumps(state, indent=1))
        for file in partial.iterdir():
            _sync(file)
        partial.rename(final)
        _sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _cannot_save(error, final) from error
    for old in steps(run)[: -config.keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _cannot_save(error: Exception, path: Path) -> OSError:
    code = getattr(error, "errno", None)
    if code is None:  # safetensors says it in words only
        code = errno.ENOSPC if re.search(r"No space left|StorageFull|os error 28", str(error)) else errno.EIO
    reason = "the disk is full" if code == errno.ENOSPC else str(error)
    return OSError(
        code,
        f"cannot write the checkpoint ({reason}); earlier checkpoints are intact: free space, then resume",
        str(path),
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = (p for p in Path(run).glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir())
    return sorted(found, key=lambda p: int(p.name[5:]))


def read(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a step's folder, or a run folder, whose newest one it then is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is incomplete, or of a format that this version cannot read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint or run folder", str(path))
    if not (path / STATE).exists():
        found = steps(path)
        if not found:
            raise ValueError(f"{path}: no checkpoint here; expected {STATE} and {MODEL}, or folders named step-000123")
        path = found[-1]
    if missing := [name for name in (STATE, MODEL) if not (path / name).exists()]:
        raise ValueError(
            f"{path}: incomplete checkpoint, {' and '.join(missing)} missing; take another step or copy it again"
        )
    try:
        state = json.loads((path / STATE).read_text())
        written = state["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE}: damaged ({error!r}); take another step or copy it again") from None
    if written != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {written}, written by farfield {state.get('version')}; this farfield reads "
            f"format {FORMAT}. Use the version that wrote it."
        )
    try:
        model, train = ModelConfig.from_dict(state["model"]), TrainConfig.from_dict(state["train"])
        return Checkpoint(path, state["step"], model, train, state["digest"], state["version"], state["random"])
    except KeyError as error:
        raise ValueError(f"{path / STATE}: damaged, {error} is missing; take another step or copy it again") from None


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", changes: Mapping[str, Any] | None = None
) -> tuple[Decoder | Encoder, ModelConfig]:
    """The model of a checkpoint (see read), with its weights, and its config.

    Args:
        changes: fields of the config that are to differ from what was trained.

    Raises:
        FileNotFoundError, ValueError: as `read`, or the weights do not fit the config.
    """
    found = read(path)
    config = replace(found.model, **known(ModelConfig, changes or {}))
    model = build(config)
    load_weights(model, found.path)
    return model.to(pick_device(device)), config


def load_codec(path: str | Path) -> Codec:
    """Bytes, or the tokenizer that the checkpoint carries."""
    folder = read(path).path
    return open_codec(folder / TOKENIZER if (folder / TOKENIZER).exists() else None)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a step's folder into `model`.

    Raises:
        ValueError: names or shapes differ; the message names the first few.
    """
    tensors, own = _load_file(folder / MODEL), model.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in tensors]
    wrong += [f"{k} is not in the model" for k in tensors if k not in own]
    wrong += [
        f"{k} has shape {list(tensors[k].shape)}, the model {list(x.shape)}"
        for k, x in own.items()
        if k in tensors and tensors[k].shape != x.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{folder / MODEL}: weights of another model: {'; '.join(wrong[:3])}{more}. "
            f"Build the model from the checkpoint's own config ({folder / STATE})."
        )
    model.load_state_dict(tensors)


def restore(found: Checkpoint, model: nn.Module, optimizers: Optimizers) -> None:
    """Put weights, optimizer state and random states where they were when the checkpoint was written."""
    if not (found.path / OPTIMIZER).exists():
        raise ValueError(f"{found.path}: {OPTIMIZER} is missing; the model can be used, but the run cannot go on")
    load_weights(model, found.path)
    optimizers.load(_load_file(found.path / OPTIMIZER))
    for name, text in found.random.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))


def _random_states() -> dict[str, str]:
    states: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return {name: base64.b64encode(s.numpy().tobytes()).decode() for name, s in states.items()}


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); take another step or copy it again") from None
