"""The package as users get it: what the wheel holds, what an import costs, what the pins say."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import farfield

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# none of these may be loaded by `import farfield`
ON_DEMAND = (
    "beartype", "farfield.bench", "farfield.cli", "farfield.nn", "farfield.testing", "farfield.train", "hypothesis",
    "matplotlib", "pandas", "rich", "safetensors", "scipy", "tokenizers", "torch._dynamo", "torch._inductor",
    "transformers", "triton", "typer",
)  # fmt: skip


def python(code: str, **env: str) -> str:
    """What `code` prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_is_pure_small_and_typed(wheel):
    assert wheel.name == f"farfield-{farfield.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"farfield-{farfield.__version__}.dist-info/METADATA").decode()
        entry_points = archive.read(f"farfield-{farfield.__version__}.dist-info/entry_points.txt").decode()
    assert "farfield/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names} == {"farfield", f"farfield-{farfield.__version__}.dist-info"}
    assert {Path(name).suffix for name in names if name.startswith("farfield/")} <= {".py", ".typed", ".html", ".css"}
    assert "farfield = farfield.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata


def test_wheel_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("farfield/") and name.endswith(".py")}
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / "farfield").rglob("*.py")}
    assert packed == there


def test_packages_have_an_init():
    # a folder without one is importable here and missing from tools that look for packages
    folders = {p.parent for p in (ROOT / "farfield").rglob("*.py")}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_import_takes_less_than_200_ms_beyond_torch():
    # processor time: other processes on the machine do not count
    # what torch has made is not walked again: a collection may fall into any import that comes after torch's
    code = "import gc, time, torch; gc.freeze(); t = time.process_time()"
    code += "; import farfield; print(time.process_time() - t)"
    # the first import compiles the modules, as that of a user does; without bytecode each would
    taken = [float(python(code, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="")) for _ in range(4)][1:]
    assert statistics.median(taken) < 0.2, f"seconds: {[round(t, 3) for t in taken]}"


def test_import_loads_nothing_heavy():
    # what torch loads by itself is torch's affair
    code = "import sys, torch; own = set(sys.modules); import farfield; print(*sorted(set(sys.modules) - own))"
    loaded = python(code).split()
    heavy = [m for m in loaded if any(m == name or m.startswith(f"{name}.") for name in ON_DEMAND)]
    assert not heavy, f"import farfield loads {', '.join(heavy)}"


def test_command_line_loads_its_libraries_on_demand():
    code = "import sys, torch; own = set(sys.modules); import farfield.cli; print(*sorted(set(sys.modules) - own))"
    loaded = set(python(code).split())
    assert "typer" in loaded
    late = {
        "matplotlib",
        "safetensors",
        "tokenizers",
        "transformers",
        "farfield.hf",
        "farfield.train",
        "farfield.bench",
        "farfield.nn",
    }
    assert not loaded & late


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pins = {re.sub("[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["hf"], *extras["text"]]:
        needed = Requirement(text)
        assert needed.name in pins, f"constraints.txt does not pin {needed.name}"
        assert needed.specifier.contains(pins[needed.name]), f"{text} excludes the pinned {pins[needed.name]}"


def test_version_is_the_same_everywhere():
    assert f"\nversion: {farfield.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {farfield.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_so_when_python_is_too_old_or_missing(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    for interpreter, message in ((str(old), "is Python 3.9.2"), ("no-such-python", "was not found")):
        done = subprocess.run(
            ["make", "demo", f"PYTHON={interpreter}", f"VENV={tmp_path / 'venv'}"],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode != 0
        assert "needs Python 3.11 or newer" in done.stderr
        assert message in done.stderr
        assert not (tmp_path / "venv").exists()
