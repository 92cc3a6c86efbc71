"""Text files as memory-mapped tokens, and batches that depend on nothing but a seed and a number."""

from __future__ import annotations

import bz2
import errno
import glob
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from farfield.train.codec import Codec, open_codec

FORMAT = 1
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Stream(Protocol):
    """Samples by number, endless."""

    def batch(self, seed: int, first: int, count: int) -> tuple[Int[Tensor, "count n"], Int[Tensor, "count n"]]:
        """Inputs and targets of the samples first .. first + count - 1; they depend on the seed and their number."""
        ...


class Source(Protocol):
    """What a run needs of what it learns from.

    Args:
        vocab: token ids are below it.
        codec: what the checkpoint keeps to read the ids; None: nothing.
        digest: the same for the same samples.
    """

    @property
    def train(self) -> Stream: ...
    @property
    def vocab(self) -> int: ...
    @property
    def codec(self) -> Codec | None: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Split:
    """A run of tokens, read in windows of `tokens` inputs and as many targets, each the token after its input.

    Args:
        ids: token ids, memory-mapped.
        sizes: bytes that each id stands for; None: one.
        tokens: n.
    """

    ids: np.ndarray
    sizes: np.ndarray | None
    tokens: int

    @property
    def windows(self) -> int:
        """How many windows fit one after another."""
        return (len(self.ids) - 1) // self.tokens

    def window(self, number: int) -> tuple[Int[Tensor, " S"], Int[Tensor, " S"]]:
        """Ids and bytes of window `number`, in the order of the text: n + 1 of them, the last is a target only."""
        at = slice(number * self.tokens, (number + 1) * self.tokens + 1)
        ids = torch.from_numpy(self.ids[at].astype(np.int64))
        sizes = torch.ones_like(ids) if self.sizes is None else torch.from_numpy(self.sizes[at].astype(np.int64))
        return ids, sizes

    def batch(self, seed: int, first: int, count: int) -> tuple[Int[Tensor, "count n"], Int[Tensor, "count n"]]:
        """Inputs and targets of the samples first .. first + count - 1 of an endless shuffled stream.

        Every pass over the text takes its windows in another order, and from another start. A sample depends on
        (seed, its number) only: a run that is cut needs no reader's state to go on.
        """
        starts = [self._start(seed, number) for number in range(first, first + count)]
        rows = np.stack([self.ids[s : s + self.tokens + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def _start(self, seed: int, number: int) -> int:
        per_pass = max(1, self.windows - 1)  # one window less, so that the start can shift by a window
        order, shift = _order(seed, number // per_pass, per_pass, len(self.ids) - 1 - per_pass * self.tokens)
        return shift + int(order[number % per_pass]) * self.tokens


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, windows: int, slack: int) -> tuple[np.ndarray, int]:
    # RandomState: NumPy promises that its streams never change
    draw = np.random.RandomState([seed % 2**32, epoch])
    return draw.permutation(windows), int(draw.randint(slack + 1))


@dataclass(frozen=True, eq=False)
class Data:
    """What a run learns from and is measured on.

    Args:
        digest: SHA-256 of all tokens: the same text, wherever it lies.
    """

    train: Split
    valid: Split
    codec: Codec
    digest: str

    @property
    def vocab(self) -> int:
        return self.codec.vocab


def open_data(
    text: str | Path | Sequence[str | Path],
    *,
    tokens: int,
    valid: str | Path | Sequence[str | Path] | None = None,
    held_out: float = 0.05,
    tokenizer: str | Path | None = None,
    cache: str | Path | None = None,
) -> Data:
    """Tokens of the text, memory-mapped: tokenized once, then opened in no time.

    Args:
        text: files, folders or globs (`**` goes down folders); .gz, .bz2 and .xz are read through. Of a folder every
            file below it, save hidden ones and those with a zero byte at their start, which are no text.
        tokens: length of a window.
        valid: held-out text; None: the last `held_out` share of the text.
        tokenizer: a `tokenizers` JSON file; None: bytes.
        cache: where the tokens are kept; default $FARFIELD_CACHE, else the user's cache folder.

    Raises:
        FileNotFoundError: a file or folder does not exist, or a glob finds nothing.
        ValueError: there is no text, or less than a window of it.
    """
    codec = open_codec(tokenizer)
    ids, sizes, digest = tokenize(text, codec, cache=cache)
    if valid is None:
        cut = len(ids) - max(round(len(ids) * held_out), min(tokens + 1, len(ids) // 2))
        train, held = Split(*_cut(ids, sizes, 0, cut), tokens), Split(*_cut(ids, sizes, cut, len(ids)), tokens)
    else:
        held_ids, held_sizes, held_digest = tokenize(valid, codec, cache=cache)
        train, held = Split(ids, sizes, tokens), Split(held_ids, held_sizes, tokens)
        digest = hashlib.sha256((digest + held_digest).encode()).hexdigest()
    for name, split, advice in (
        ("training", train, ""),
        ("held-out", held, ", give held-out text of its own (valid=...)"),
    ):
        if not split.windows:
            raise ValueError(
                f"the text is too short: {len(split.ids):,} {name} tokens, but a window of {tokens:,} needs "
                f"{tokens + 1:,}. Give more text{advice}"
                + (f", or windows of {len(split.ids) - 1:,} tokens or fewer" if len(split.ids) > 1 else "")
            )
    return Data(train, held, codec, digest)


def _cut(ids: np.ndarray, sizes: np.ndarray | None, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
    return ids[start:stop], None if sizes is None else sizes[start:stop]


def find_files(text: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `text` names (see open_data), sorted within each entry, none twice."""
    entries = [text] if isinstance(text, str | Path) else list(text)
    if not entries:
        raise ValueError("no text given: name a file, a folder or a glob")
    found: dict[Path, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_file():
            if not path.stat().st_size:
                raise ValueError(f"{path} is empty")
            files = [path]
        elif path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.is_file() and _is_text(f, path)]
        else:
            files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(f)]
            if not files:
                raise FileNotFoundError(errno.ENOENT, "no such file, folder or glob", str(entry))
        found |= dict.fromkeys(f.resolve() for f in files if f.stat().st_size)
    if not found:
        raise ValueError(f"no text in {', '.join(map(str, entries))}: every file is empty, hidden or binary")
    return list(found)


def _is_text(path: Path, folder: Path) -> bool:
    if any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts):
        return False
    with _open(path) as stream:
        return b"\0" not in stream.read(4096)


def _open(path: Path):
    return OPENERS.get(path.suffix, open)(path, "rb")


def tokenize(
    text: str | Path | Sequence[str | Path], codec: Codec, *, cache: str | Path | None = None
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Token ids of the files one after another, the bytes each stands for, and the SHA-256 of the ids.

    Memory-mapped from a cache folder that is written under a temporary name and renamed when complete. The cache is
    keyed by the files' paths, sizes and times, and by the tokenizer.
    """
    files = find_files(text)
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([FORMAT, codec.digest, stamps]).encode()).hexdigest()[:24]
    folder = _cache_folder(cache) / key
    if not (folder / "meta.json").exists():
        _write(folder, files, codec)
    meta = json.loads((folder / "meta.json").read_text())
    ids = np.memmap(folder / "ids.bin", meta["dtype"], "r")
    sizes = np.memmap(folder / "sizes.bin", np.uint32, "r") if meta["sizes"] else None
    return ids, sizes, meta["digest"]


def _cache_folder(cache: str | Path | None) -> Path:
    if cache is None:
        user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = os.environ.get("FARFIELD_CACHE") or Path(user) / "farfield" / "tokens"
    return Path(cache).expanduser()


def _write(folder: Path, files: list[Path], codec: Codec) -> None:
    dtype = np.dtype("uint8" if codec.vocab <= 1 << 8 else "uint16" if codec.vocab <= 1 << 16 else "uint32")
    digest, count, sized = hashlib.sha256(), 0, False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise _cannot(error, folder) from None
    try:
        with open(partial / "ids.bin", "wb") as ids, open(partial / "sizes.bin", "wb") as sizes:
            for file in files:
                with _open(file) as stream:
                    for piece, size in codec.pieces(stream):
                        raw = piece.astype(dtype).tobytes()
                        ids.write(raw)
                        digest.update(raw)
                        count += len(piece)
                        if size is not None:
                            sizes.write(size.tobytes())
                            sized = True
        if not count:
            raise ValueError(f"no tokens in {', '.join(map(str, files[:3]))}")
        meta = {"dtype": dtype.name, "sizes": sized, "digest": digest.hexdigest(), "files": [str(f) for f in files]}
        (partial / "meta.json").write_text(json.dumps(meta))
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was faster, with the same tokens
                raise
    except OSError as error:
        raise _cannot(error, folder) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cannot(error: OSError, folder: Path) -> OSError:
    if error.filename and not str(error.filename).startswith(str(folder.parent)):
        return error  # about a text file, not about the cache
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    return OSError(
        error.errno, f"cannot keep tokens ({reason}); free space or name another folder (cache=...)", str(folder)
    )
