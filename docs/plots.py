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

# as the record has it; fma with the same options today
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
    CHOSEN.format(5, 32).replace("rank=4", "rank=1"): "fma, 5 groups opened, 1 row a group",
    f"fma:rank=16,near=128/{CHOSEN.format(16, 32)}": "fma; every fourth layer 16 groups opened",
}
"""The labels that the plots show, and what they call them; those that the record has."""

EVERY = ROOT / "results" / "h200" / "compare-mechanisms.json"
"""All mechanisms, with fewer tokens."""


def shown(record: Path = RECORD) -> dict[str, dict[str, Any]]:
    """The models of the plots, by the names that they have there."""
    models = merged(json.loads(record.read_text(encoding="utf-8")))
    return {name: models[label] for label, name in NAMES.items() if label in models}


def others(record: Path = EVERY) -> dict[str, dict[str, Any]]:
    """All mechanisms by their names, the best first; none without the record."""
    if not record.exists():
        return {}
    models = merged(json.loads(record.read_text(encoding="utf-8")))
    there = sorted((m["overall"], label) for label, m in models.items() if ", cut at " not in label)
    return {NAMES.get(label, label.partition(":")[0]): models[label] for _, label in there}


def at_length(models: dict[str, dict[str, Any]], length: int) -> dict[str, Any]:
    """Bits per byte by position in windows of this length, of the models that were scored there."""
    found = {name: x for name, m in models.items() for x in m.get("lengths", ()) if x["length"] == length}
    return {name: x["by_position"] for name, x in found.items() if "by_position" in x}


def figures(models: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """Every plot by its file's name."""
    rows = {name: (m["rows"], m["overall"]) for name, m in models.items() if m["rows"] is not None}
    found = {
        "quality-repeat": plots.repeat_figure({name: m["by_repeat"] for name, m in models.items()}),
        "quality-rows": plots.rows_figure(rows),
        "quality-length": plots.position_figure(at_length(models, 1 << 17)),
    }
    if more := others():
        found["quality-mechanisms"] = plots.repeat_figure({name: m["by_repeat"] for name, m in more.items()})
    return found


if __name__ == "__main__":
    for name, figure in figures(shown()).items():
        plots.save(figure, HERE / f"{name}.svg")
