"""One red line and exit code 2 for what a user can put right; a traceback for what is a bug."""

from __future__ import annotations

import errno
import os
import sys

from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import Exit

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Commands(TyperGroup):
    """The app's group: turns expected errors of any command into messages."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # the reader of `farfield ... | head` has gone; nothing is left to say, nor to flush at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise Exit(1) from None
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            complain("interrupted")
            raise Exit(INTERRUPTED) from None
        except Exception as error:
            message = explain(error)
            if message is None or ctx.params.get("debug"):
                raise
            complain(message)
            raise Exit(2) from None


def complain(message: str) -> None:
    """One red line on stderr, as it is: no markup, no wrapping."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"farfield: {message}", style="red"))


def explain(error: Exception) -> str | None:
    """What to tell the user, or None if `error` is a bug and needs its traceback."""
    text = str(error).strip()
    name = type(error).__name__
    if isinstance(error, OSError):
        return _explain_os(error)
    # by name: the libraries themselves are not imported before they are needed
    if name == "SafetensorError":
        if "No space left" in text or "StorageFull" in text:
            return f"the disk is full; free some space and try again ({text})"
        return f"not a readable safetensors file: {text}"
    if name == "OutOfMemoryError" or "can't allocate memory" in text or "not enough memory" in text:
        return f"out of memory; use fewer tokens, a smaller batch or a smaller model ({text.splitlines()[0]})"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "tokenizers":
        return "a tokenizer file needs the tokenizers library: pip install tokenizers"
    if isinstance(error, (ValueError, NotImplementedError)):
        return text or name
    return None


def _explain_os(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno is None or (error.strerror and error.strerror != os.strerror(error.errno)):
        # whoever raised it said more than the system does
        return f"{where}{error.strerror or error}"
    match error.errno:
        case errno.ENOSPC:
            return f"{where}the disk is full; free some space and try again"
        case errno.ENOENT:
            return f"{where}no such file or folder"
        case errno.EISDIR:
            return f"{where}is a folder, a file is needed"
        case errno.EACCES | errno.EPERM:
            return f"{where}permission denied"
        case _:
            return f"{where}{error.strerror or error}"
