"""The plots of the documentation, from the records: python docs/plots.py writes docs/plots/*.svg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farfield.bench import plots
from farfield.bench.compare import merged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
HERE = ROOT / "docs" / "plots"
RECORD = ROOT / "results" / "h200" / "compare-csource.json"

CHOSEN = "fma-opened:rank=4,near=128,open={},beam={},detail=16,score=mean"
NAMES = {
    "full": "full",
    "fma:rank=16,near=128": "fma",
    "window:width=512": "window 512",
    CHOSEN.format(4, 16): "fma, 4 groups opened",
    CHOSEN.format(16, 32): "fma, 16 groups opened",
    "fma:rank=16,near=128/full": "fma; every fourth layer full",
    "near-field:near=128": "near field alone",
    "window:width=256": "window 256",
    CHOSEN.format(4, 16).replace("mean", "peak"): "fma, 4 groups opened by peaks",
}
"""The labels that the plots show, and what they call them."""


def shown(record: Path = RECORD) -> dict[str, dict[str, Any]]:
    """The models of the plots, by the names that they have there."""
    models = merged(json.loads(record.read_text(encoding="utf-8")))
    return {name: models[label] for label, name in NAMES.items() if label in models}


def at_length(models: dict[str, dict[str, Any]], length: int) -> dict[str, Any]:
    """Bits per byte by position in windows of this length, of the models that were scored there."""
    found = {name: x for name, m in models.items() for x in m["lengths"] if x["length"] == length}
    return {name: x["by_position"] for name, x in found.items() if "by_position" in x}


def figures(models: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """Every plot by its file's name."""
    return {
        "quality-repeat": plots.repeat_figure({name: m["by_repeat"] for name, m in models.items()}),
        "quality-rows": plots.rows_figure({name: (m["rows"], m["overall"]) for name, m in models.items()}),
        "quality-length": plots.position_figure(at_length(models, 1 << 17)),
    }


if __name__ == "__main__":
    for name, figure in figures(shown()).items():
        plots.save(figure, HERE / f"{name}.svg")
