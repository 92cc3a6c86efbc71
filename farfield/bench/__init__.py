"""Benchmarks: cases, the runner, records, plots, the demo and its report.

A module of this folder that is not part of the machinery is a case: it registers itself with `runner.bench`.
"""

from __future__ import annotations

from farfield.bench.runner import PASSES, Bench, Work, baseline, bench, get, names, run

__all__ = ["MACHINERY", "PASSES", "Bench", "Work", "baseline", "bench", "get", "names", "run"]

MACHINERY = ("compare", "demo", "learning", "memory", "plots", "records", "report", "runner", "tables", "worker")
