"""Text to token ids and back: bytes, or a `tokenizers` JSON file."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

PIECE = 1 << 20  # bytes encoded at a time


@runtime_checkable
class Codec(Protocol):
    """What text and tokens need of each other."""

    vocab: int
    digest: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids of `text`."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids`; what is no UTF-8 becomes U+FFFD."""
        ...

    def pieces(self, stream) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Ids of a binary stream, a piece at a time, with the bytes each id stands for (None: one)."""
        ...

    def stream(self) -> TextStream:
        """A decoder of one id after another."""
        ...


@runtime_checkable
class TextStream(Protocol):
    """Ids one by one into text that is whole at every moment."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty inside a character."""
        ...

    def close(self) -> str:
        """What is left of an unfinished character."""
        ...


class Bytes:
    """One token a byte, 0..255."""

    vocab = 256
    digest = "bytes"

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return bytes(ids).decode(errors="replace")

    def pieces(self, stream) -> Iterator[tuple[np.ndarray, None]]:
        while piece := stream.read(PIECE):
            yield np.frombuffer(piece, np.uint8), None

    def stream(self) -> TextStream:
        return _ByteStream()


class Tokenizer:
    """The tokens of a `tokenizers` JSON file. Special tokens are never added."""

    def __init__(self, path: str | Path):
        from tokenizers import Tokenizer as Load

        try:
            self.source = Path(path).expanduser().read_text(encoding="utf-8")
            self.inner: Any = Load.from_str(self.source)
        except OSError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizers JSON file ({error})") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.vocab = max(self.inner.get_vocab().values()) + 1
        self.digest = hashlib.sha256(self.source.encode()).hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, stream) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # cut at line ends, so that no word is cut
        while lines := stream.readlines(PIECE):
            text = b"".join(lines).decode(errors="replace")
            found = self.inner.encode(text, add_special_tokens=False)
            if found.ids:
                yield np.array(found.ids, np.uint32), _bytes_of(text, found.offsets)

    def stream(self) -> TextStream:
        return _TokenStream(self)


def open_codec(tokenizer: str | Path | None = None) -> Codec:
    """The codec of a `tokenizers` JSON file, or bytes for None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file.
        ModuleNotFoundError: the tokenizers library is not installed.
    """
    return Bytes() if tokenizer is None else Tokenizer(tokenizer)


def _bytes_of(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes that each token stands for: up to its end from the end before; whatever a normaliser dropped counts
    for the next token, at the end of the text for the last. Sums to the text's bytes."""
    width = np.fromiter((len(c.encode()) for c in text), np.int64, len(text)) if not text.isascii() else None
    upto = np.arange(len(text) + 1) if width is None else np.concatenate([[0], width.cumsum()])
    ends = np.maximum.accumulate(np.array([end for _, end in offsets]))
    ends[-1] = len(text)
    return np.diff(upto[ends], prepend=0).astype(np.uint32)


class _ByteStream:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(bytes([token]))

    def close(self) -> str:
        return self.decoder.decode(b"", final=True)


class _TokenStream:
    def __init__(self, codec: Tokenizer):
        from tokenizers.decoders import DecodeStream

        self.codec, self.stream = codec, DecodeStream(skip_special_tokens=False)

    def push(self, token: int) -> str:
        return self.stream.step(self.codec.inner, int(token)) or ""

    def close(self) -> str:
        return ""
