"""A process of its own for work that may take its process down: a fault on the GPU, a kernel that never ends.

A GPU's context does not survive an illegal access, so what comes after it in the same process fails as well. Here the
process goes, the work that did it is reported with the reason, and the next piece of work gets a fresh process.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from farfield.bench.runner import reason

VISIBLE = "CUDA_VISIBLE_DEVICES"
_starting = threading.Lock()  # the environment is that of all threads
PATIENCE = 120.0  # seconds that a process may take to start, and after Ctrl-C to save what it has


class WorkError(Exception):
    """Work that failed; the message is the reason in one line."""


class Worker:
    """Runs generators one after another, in a process of their own or, with `own=False`, in this one.

    Args:
        limit: seconds without a word after which the work is ended; needs `own`.
        gpu: the only GPU that the process sees, by its number here; None: all of them. Needs `own`.
    """

    def __init__(self, *, own: bool, limit: float = math.inf, gpu: int | None = None):
        self.own, self.limit, self.gpu = own, limit, gpu
        self.process: Any = None
        self.pipe: Any = None

    def run(self, work: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
        """What `work(*args)` yields. `work` is a function of a module, and everything goes through pickle.

        Raises:
            WorkError: it raised, or its process ended.
            KeyboardInterrupt: Ctrl-C, after the work has had the time to save.
        """
        if not self.own:
            try:
                yield from work(*args)
            except Exception as error:
                raise WorkError(reason(error)) from error
            return
        self._start()
        self.pipe.send((work, args))
        while True:
            kind, value = self._receive()
            if kind == "item":
                yield value
            elif kind == "end":
                return
            elif kind == "interrupted":
                raise KeyboardInterrupt
            else:
                raise WorkError(value)

    def close(self, patience: float = 10.0) -> None:
        """Let the process end, or end it when it does not within `patience` seconds."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(patience)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        if self.process is not None and self.process.is_alive():
            return
        # a forked child of a process with threads and a GPU context is no fresh one
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # no daemon: those may not have processes of their own, as compilers do
        self.process = context.Process(target=_serve, args=(theirs,))
        with _only(self.gpu):
            self.process.start()
        theirs.close()
        # loading PyTorch is not part of anybody's limit
        if (found := self._wait(PATIENCE)) != ("ready", None):
            raise RuntimeError(f"worker: the process did not start: {found[1]}")

    def _receive(self) -> tuple[str, Any]:
        try:
            return self._wait(self.limit)
        except KeyboardInterrupt:
            # the terminal has told the process too
            while self._wait(PATIENCE)[0] == "item":
                pass
            raise

    def _wait(self, seconds: float) -> tuple[str, Any]:
        until = time.monotonic() + seconds
        while not self.pipe.poll(min(1.0, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                self.close(0)
                return "error", f"no answer within {seconds:g} s; its process was ended"
        try:
            kind, value, lost = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self.process = None
            return "error", f"its process ended with exit code {code}"
        if lost:
            self.close(0)
        return kind, value


@contextmanager
def _only(gpu: int | None) -> Iterator[None]:
    """Within it a process that starts sees this GPU alone, from its first import on."""
    if gpu is None:
        yield
        return
    with _starting:
        seen = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = seen.split(",")[gpu] if seen else str(gpu)
        try:
            yield
        finally:
            if seen is None:
                del os.environ[VISIBLE]
            else:
                os.environ[VISIBLE] = seen


def _serve(pipe: Any) -> None:
    """The process: one generator after another, until the pipe closes."""
    pipe.send(("ready", None, False))
    while True:
        try:
            work, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            for item in work(*args):
                pipe.send(("item", item, False))
            pipe.send(("end", None, False))
        except BrokenPipeError:
            return
        except KeyboardInterrupt:
            pipe.send(("interrupted", None, False))
        except Exception as error:
            pipe.send(("error", reason(error), _lost()))
        _tidy()


def _lost() -> bool:
    """Whether the GPU's context is past use."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _tidy() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_initialized() and not _lost():
        torch.cuda.empty_cache()
