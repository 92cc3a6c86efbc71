"""Records: one JSON line per measured point, with everything needed to judge or repeat it.

A record names the command, the commit, the date, the machine, the versions, the threads and the load besides the
numbers. Files live in results/<machine>/<bench>.jsonl; the machine is called by what it is, never by its host name.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

PACKAGE = Path(__file__).resolve().parent.parent

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Record:
    """One contender at one point of a benchmark.

    Args:
        bench: name of the benchmark.
        contender: what was timed: the bench's own work, or a baseline.
        passes: "forward", "forward+backward", "backward" (of a forward made before) or "step" (as the case defines it).
        dtype: of q, k and v.
        params: the point: tokens, heads, options of the mechanism.
        status: "ok", or why there are no times; `reason` then says it in words.
        times: seconds: min, q10, median, q90, max, and how many samples and rounds.
        ratio: median over rounds of baseline time / own time; above 1 is faster than the baseline.
        against: the baseline of `ratio`.
        ratios: the same for every baseline.
        setup: seconds for building what the call takes as given, such as a layout; not part of `times`.
        floor: what the call cannot do without, `bytes` and `flops`, and the `seconds` these take at the machine's
            `bytes/s` and `flop/s`, the larger of the two; `share` is that over the median.
        rates: what the case reads off its times, under the case's names.
        backend: the implementation that really ran, for baselines with several.
        memory: peak bytes allocated by one call beyond its inputs; outputs and gradients count.
        rss: peak growth of the process in the same call; None where the system does not tell.
        flops: arithmetic of the area really read; a multiply and an add count as two.
        bytes: least traffic: inputs read once, outputs written once.
        check: what the result was compared with before timing, and the error found.
        env: `environment()`.
    """

    bench: str
    contender: str
    passes: str
    dtype: str
    params: Mapping[str, Any]
    status: Status = "ok"
    reason: str = ""
    times: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None
    against: str | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    setup: float | None = None
    floor: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    backend: str = ""
    memory: int | None = None
    rss: int | None = None
    flops: float | None = None
    bytes: float | None = None
    check: Mapping[str, Any] | None = None
    env: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(self.params["tokens"])

    @property
    def seconds(self) -> float:
        """The median; nan where nothing was timed."""
        return self.times.get("median", float("nan"))


def append(path: Path | str, *records: Record) -> None:
    """Add one line per record, in a single write: concurrent writers do not mix, a full disk leaves no half line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(r), sort_keys=False, allow_nan=False) + "\n" for r in records).encode()
    with path.open("ab", buffering=0) as file:
        _lock(file)
        start = file.seek(0, os.SEEK_END)
        written = 0
        try:
            written = file.write(text)
        finally:
            if written != len(text):
                file.truncate(start)
        if written != len(text):
            raise OSError(f"{path}: only {written} of {len(text)} bytes could be written; is the disk full?")


def load(path: Path | str) -> list[Record]:
    """Every record of a file.

    Raises:
        ValueError: a line is no record; the message names it.
    """
    known = {f.name for f in fields(Record)}
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            found.append(Record(**{k: v for k, v in raw.items() if k in known}))
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not a benchmark record ({error})") from None
    return found


def write_atomic(path: Path | str, text: str) -> None:
    """Replace a file as a whole: readers see the old text or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and when a measurement is made: command, commit, date, machine, versions, threads, load average."""
    return {
        "command": command(),
        **commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "load": load_average(),
    }


def command() -> str:
    """The command line of this process, without the folder of the interpreter or script."""
    script = Path(sys.argv[0] or "python")
    program = script.name
    if program == "__main__.py" and "farfield" in script.parts:
        program = "farfield"
    elif program.endswith(".py") or program in ("", "-c"):
        program = f"python {program}".strip()
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def commit() -> dict[str, Any]:
    """The commit of this source tree and whether the package differs from it; "unknown" outside git."""
    try:
        # an installed package may lie inside a checkout that does not track it
        _git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the machine is made of."""
    about: dict[str, Any] = {
        "name": machine_name(device),
        "cpu": _cpu_model(),
        "cores": cores(),
        "gpu": None,
        "driver": None,
    }
    if torch.device(device).type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "driver": _driver()}
    return about


def machine_name(device: torch.device | str = "cpu") -> str:
    """Slug of the machine and folder of its records: "cpu-2core", "h200"; $FARFIELD_MACHINE overrides it."""
    if given := os.environ.get("FARFIELD_MACHINE"):
        return slug(given)
    if torch.device(device).type == "cuda":
        return slug(re.sub(r"(?i)nvidia|geforce|tesla|amd", "", torch.cuda.get_device_name(device)))
    return f"cpu-{cores()}core"


def slug(text: str) -> str:
    """Lower case, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes; None where the system does not tell."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str | None]:
    """python, torch, triton and farfield; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "farfield": _own_version(),
    }


def results_path(bench: str, out: Path | str = "results", device: torch.device | str = "cpu") -> Path:
    """`out`/<machine>/<bench>.jsonl."""
    return Path(out) / machine_name(device) / f"{slug(bench)}.jsonl"


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of every point, so that a file with several runs draws one line each."""
    found = {}
    for r in records:
        found[r.contender, r.passes, r.dtype, json.dumps(r.params, sort_keys=True)] = r
    return list(found.values())


def _own_version() -> str | None:
    loaded = sys.modules.get("farfield")
    return getattr(loaded, "__version__", None) or _version("farfield")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _lock(file) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system; appending is still one write
        return
    fcntl.flock(file, fcntl.LOCK_EX)
