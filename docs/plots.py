"""The plots of the documentation, from the records: python docs/plots.py writes docs/plots/*.svg."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import quality_tables

from farfield.bench import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent / "plots"

SHOWN = (
    "full",
    "fma:rank=16,near=128",
    "window:width=512",
    "fma:rank=4,near=128,open=4,beam=16",
    *quality_tables.STRIDED,
    "fma:rank=16,near=128/full",
    "fma:rank=16,near=128/fma:rank=4,near=128,open=16,beam=32",
    "near-field:near=128/fma:rank=4,near=128,open=16,beam=32",
    "near-field:near=128",
)
NAMES = {label: quality_tables.name(label) for label in SHOWN}
"""The labels that the plots show, and what they call them; those that the record has."""


def shown() -> dict[str, dict[str, Any]]:
    """The models of the plots, by the names that they have there."""
    models = quality_tables.models()
    return {name: models[label] for label, name in NAMES.items() if label in models}


def others() -> dict[str, dict[str, Any]]:
    """All mechanisms by their names, the best first."""
    found = quality_tables.others(quality_tables.models())
    return {quality_tables.name(label): m for label, m in found.items()}


def at_length(models: dict[str, dict[str, Any]], length: int) -> dict[str, Any]:
    """Bits per byte by position in windows of this length, of the models that were scored there."""
    found = {name: x for name, m in models.items() for x in m.get("lengths", ()) if x["length"] == length}
    return {name: x["by_position"] for name, x in found.items() if "by_position" in x}


def trained_at_32k() -> dict[str, Any]:
    """Bits per byte by position of the models that were trained in windows of 32,768."""
    found = quality_tables.models(quality_tables.LONG_WINDOWS)
    return {quality_tables.name(label): m["by_position"] for label, m in found.items()}


def unrotated(length: int) -> dict[str, Any]:
    """The same of layers without positions, as they read farther best."""
    found = quality_tables.found_again("log_scale", length)
    return {
        f"{quality_tables.name(label)}, log_scale": x["by_position"]
        for label, x in found.items() if "rope_share=0" in label
    }  # fmt: skip


def figures(models: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """Every plot by its file's name."""
    rows = {name: (m["rows"], m["overall"]) for name, m in models.items() if m["rows"] is not None}
    return {
        "quality-repeat": plots.repeat_figure({name: m["by_repeat"] for name, m in models.items()}),
        "quality-rows": plots.rows_figure(rows),
        "quality-length": plots.position_figure(at_length(models, 1 << 17) | unrotated(1 << 17)),
        "quality-32k": plots.position_figure(trained_at_32k()),
        "quality-mechanisms": plots.repeat_figure({name: m["by_repeat"] for name, m in others().items()}),
    }


if __name__ == "__main__":
    for name, figure in figures(shown()).items():
        plots.save(figure, HERE / f"{name}.svg")
