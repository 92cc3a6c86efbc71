"""The tables of docs/quality.md that are read off records: python docs/quality_tables.py writes them.

Each stands between two comment lines that name it; a test compares. Runs that were cut are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import spots
from spots import short, table

from farfield.bench import recall
from farfield.bench.compare import merged

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quality.md"
RESULTS = ROOT / "results" / "h200"
COMPARED, ASKED = RESULTS / "compare-csource.json", RESULTS / "recall-mqar.json"
OWN = ("full", "window", "near-field", "fma", "fma-opened")  # mechanisms of the first two tables of COMPARED
NEAR, PLAIN, OPENED = "near-field:near=128", "fma:rank=16,near=128", "fma:rank=4,near=128,open=16,beam=32"
STRIDED = ("fma:rank=16,near=64,pool=strided", "fma:rank=1,near=64/fma:rank=64,near=192,pool=strided")
FRAME = ("full", PLAIN, "fma:rank=4,near=128,open=4,beam=16", NEAR, *STRIDED)  # in both
FIRST = (  # the rest of OWN is in the second: other pools, ranks, widths and numbers of opened groups
    *FRAME,
    "window:width=512",
    "window:width=256",
    f"{PLAIN}/full",
    f"{PLAIN}/{OPENED}",
    f"{NEAR}/full",
    f"{NEAR}/full:rope_share=0",
    f"{NEAR}/{OPENED}",
    f"{NEAR}/{OPENED},rope_share=0",
)
ALL_OPENED = "fma-opened:rank=4,near=128,open=16,beam=32,detail=16,score=mean"  # 16 groups in every layer
HELD_BESIDE = ("full", NEAR, f"{NEAR}/{OPENED}", f"{NEAR}/{OPENED},rope_share=0", ALL_OPENED)
SUPERSEDED = "fma-opened:rank=4,near=128,open=4,beam=16,detail=16,score=mean"  # by fma with the same options
SHORT = RESULTS / "compare-mechanisms.json"  # all mechanisms, with a quarter of the bytes
LONG = RESULTS / "compare-csource-long.json"  # twice the bytes
LONGEST = RESULTS / "compare-csource-150m.json"  # 150 M bytes
GROUPED = RESULTS / "compare-csource-gqa.json"  # two key heads for eight query heads
GROUPED_READ = RESULTS / "compare-csource-gqa-read.json"  # models of GROUPED read with other fields
LONG_WINDOWS = RESULTS / "compare-csource-32k.json"  # half the bytes, in windows of 32,768
PASSED = RESULTS / "recall-passkey.json"
PASSED_LONG = RESULTS / "recall-passkey-long.json"  # twice the steps
BESIDE = ("full", "fma:rank=16,near=128", "window:width=512")  # models that the others are shown beside
NOVELS = RESULTS / "compare-novels.json"  # five novels, and one held out
REREAD = RESULTS / "compare-csource-lengths.json"  # models of COMPARED read with other fields
REASKED = RESULTS / "recall-mqar-changes.json"  # the same of those that ASKED is on
BUCKETS = ("none", "1-128", "128-512", "512-1k", ">1k")
put = partial(spots.put, script="docs/quality_tables.py")

Models = Mapping[str, Mapping[str, Any]]


def name(label: str) -> str:
    """What a label of a comparison is called on the page."""
    first, slash, other = label.partition("/")
    if slash:
        return f"{name(first)}; every fourth layer {name(other).removeprefix('fma, ')}"
    kind, _, given = label.partition(":")
    options = dict(pair.split("=") for pair in given.split(",") if pair)
    if options.pop("rope_share", None) == "0":
        rest = ",".join(f"{k}={v}" for k, v in options.items())
        return f"{name(f'{kind}:{rest}' if rest else kind)}, no rotation"
    # `fma-opened` was a control of the time of the first records: fma with these options
    if kind == "fma-opened" or (kind == "fma" and options.get("open", "0") != "0"):
        said = f"fma, {options['open']} groups opened"
        said += " by peaks" if options.get("score") == "peak" else ""
        # the control's means were rounded to bfloat16, its peaks not
        said += " by rounded means" if kind == "fma-opened" and options.get("score") == "mean" else ""
        said += f", sketches of {options['detail']}" if options.get("detail", "16") != "16" else ""
        said += f", near {options['near']}" if options.get("near", "128") != "128" else ""
        said += f", {_rows(options.get('rank', '16'))} a group" if options.get("rank") != "4" else ""
        said += f", {options['hold']} queries together" if "hold" in options else ""
        return f"{said} by the mean of {options['askers']}" if "askers" in options else said
    if kind == "window":
        return f"window {options['width']}"
    if kind == "near-field":
        near = options.get("near", "128")
        return "near field alone" if near == "128" else f"near field alone, near {near}"
    if kind == "fma":
        more = [f"blocks of {options['block']}"] if "block" in options else []
        more += [f"{_rows(options['rank'])} a group"] if options.get("rank", "16") != "16" else []
        more += [f"near {options['near']}"] if options.get("near", "128") != "128" else []
        more += [options["pool"]] if "pool" in options else []
        return ", ".join(["fma", *more])
    # what other mechanisms were given says the text
    return kind


def _rows(rank: str) -> str:
    return "1 row" if rank == "1" else f"{rank} rows"


def models(path: Path = COMPARED) -> dict[str, dict[str, Any]]:
    """The complete runs of a comparison by their labels, the best first."""
    found = merged(json.loads(path.read_text(encoding="utf-8")))
    there = {label: m for label, m in found.items() if ", cut at " not in label}
    return dict(sorted(there.items(), key=lambda item: item[1]["overall"]))


def of_fma(found: Models) -> dict[str, Mapping[str, Any]]:
    """FMA, full attention, windows and near fields."""
    return {label: m for label, m in found.items() if label in FIRST}


def swept(found: Models) -> dict[str, Mapping[str, Any]]:
    """FMA with other options, and what it is shown beside."""
    apart = {*FIRST, SUPERSEDED, *held(found)} - {ALL_OPENED}
    return {label: m for label, m in found.items() if label in FRAME or (m["attention"] in OWN and label not in apart)}


def held(found: Models) -> dict[str, Mapping[str, Any]]:
    """FMA with less choosing: queries that choose together, coarser sketches, and what they are shown beside."""
    less = ("hold=", "detail=8", "detail=4")
    return {label: m for label, m in found.items() if label in HELD_BESIDE or any(x in label for x in less)}


def others(found: Models) -> dict[str, Mapping[str, Any]]:
    """Every other mechanism, and what it is shown beside."""
    return {label: m for label, m in found.items() if m["attention"] not in OWN or label in BESIDE}


def scores(found: Models, before: Models = MappingProxyType({}), n: int = 8192) -> str:
    """Bits per byte by position in windows of n and by repeat, each seed's where there are several.

    `before`: after fewer bytes.
    """
    share = {bucket: part for bucket, _, part in next(iter(found.values()))["by_repeat"]}
    # from the near field alone to full attention, where a comparison has both
    closed = any(m.get("gap") is not None for m in found.values())
    headings = ["attention", "rows", *["10.6 M bytes"] * bool(before), "all", f"first {n // 16:,}", f"from {n // 2:,}"]
    headings += ["gap closed"] * closed
    headings += [f"{b} ({share.get(b, 0):.0%})" for b in BUCKETS]
    body = []
    for label, m in found.items():
        by = {bucket: bits for bucket, bits, _ in m["by_repeat"]}
        each = _seeds(m)
        gap = ["" if m.get("gap") is None else f"{m['gap']:.0%}"] * closed
        body.append([name(label), _whole(m["rows"]), *[_seeds(before.get(label))] * bool(before), each,
                     f"{m['early']:.3f}", f"{m['late']:.3f}", *gap, *(_bits(by.get(b)) for b in BUCKETS)])  # fmt: skip
    for label, m in before.items():
        if label not in found:
            body.append([name(label), _whole(m["rows"]), _seeds(m), *[""] * (len(headings) - 3)])
    return table(headings, body)


def copies(found: Models) -> str:
    """Bits per byte of the first and the second copy."""
    probes = next(m["copies"] for m in found.values() if m["copies"])
    kinds = {"text": "code"}
    headings = [f"{kinds.get(p['kind'], p['kind'])} {p['length']} at {p['distance']:,}" for p in probes]
    body = [[name(label), *(f"{p['first']:.2f} to {p['second']:.2f}" for p in m["copies"])]
            for label, m in found.items() if m["copies"]]  # fmt: skip
    return table(["attention", *headings], body)


def lengths(found: Models) -> str:
    """Bits per byte in longer windows, rows and speed at the longest, state at 128k."""
    all_of_them = sorted({x["length"] for m in found.values() for x in m.get("lengths", ())})
    last = all_of_them[-1]
    headings = ["attention", *(short(n) for n in all_of_them), f"rows at {short(last)}", "state at 128k",
                f"tokens/s at {short(last)}"]  # fmt: skip
    body = []
    for label, m in found.items():
        at = {x["length"]: x for x in m.get("lengths", ()) if x.get("overall") is not None}
        if at:
            state, end = at.get(1 << 17, {}).get("state"), at.get(last, {})
            body.append([
                name(label), *(_bits(at.get(n, {}).get("overall")) for n in all_of_them), _whole(end.get("rows")),
                "" if not state else f"{state / 2**20:,.1f} MiB", _whole(end.get("speed")),
            ])  # fmt: skip
    return table(headings, body)


def reread(path: Path = REREAD) -> str:
    """Bits per byte in longer windows, as trained and with other fields; each seed's where there are several."""
    rows: dict[tuple[str, str, int], list[str]] = {}
    for model, _, scored in _parts(path):
        for x in (x for x in scored if x["group"] == "length" and x.get("overall") is not None):
            # choices that queries share have a sentence of their own
            if "choose together" not in x["label"]:
                read = "as trained" if x["label"] == "plain" else x["label"].removesuffix(" in all layers")
                rows.setdefault((model, read, x["length"]), []).append(_bits(x["overall"]))
    return _read({at: " / ".join(each) for at, each in sorted(rows.items())})


def found_again(read: str, length: int, path: Path = REREAD) -> dict[str, dict[str, Any]]:
    """By label, the last that was found in windows of this length with fields of this name, in all layers."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {
        part["checkpoint"][1]: x
        for key, part in found.items() if key != "env" for x in part["found"]
        if x["group"] == "length" and x["length"] == length and x["label"].removesuffix(" in all layers") == read
    }  # fmt: skip


def _parts(path: Path) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Model, seed and what was found of each part of a record of trained models."""
    found = json.loads(path.read_text(encoding="utf-8"))
    parts = ((x["checkpoint"], x["found"]) for key, x in found.items() if key != "env")
    return sorted(((name(label), seed, scored) for (_, label, seed), scored in parts), key=lambda part: part[1])


def _read(rows: Mapping[tuple[str, str, int], str]) -> str:
    """What models give by what they were read with and by length."""
    tested = sorted({n for _, _, n in rows})
    body = []
    for model, said in dict.fromkeys((model, said) for model, said, _ in rows):
        body.append([model, said, *(rows.get((model, said, n), "") for n in tested)])
    return table(["attention", "read with", *(short(n) for n in tested)], body)


def masses(path: Path = REREAD) -> str:
    """How much of a query's softmax lies far, and how much of that in 1, 4 and 16 groups, by how they are chosen."""
    ways = {"best": "by their mass", "mean of 4": "by means of 4 keys", "mean of 64": "by means of 64 keys"}
    body = []
    for model, x in ((model, x) for model, _, scored in _parts(path) for x in scored if "layers" in x):
        for layer, at in x["layers"].items():
            shares = [" / ".join(f"{at[f'{way} {n}'] / at['far']:.0%}" for n in (1, 4, 16)) for way in ways]
            body.append([model, f"{int(layer) + 1}", f"{at['far']:.0%}", *shares])
    return table(["trained as", "layer", "far", *(f"in 1 / 4 / 16 groups {way}" for way in ways.values())], body)


def choices(part: str = "choice", path: Path = REREAD) -> str:
    """One model, trained with one choice, read with others."""
    scored = json.loads(path.read_text(encoding="utf-8"))[part]["found"]
    body = []
    for x in (x for x in scored if x["group"] == "choice" and x.get("overall") is not None):
        by = {bucket: bits for bucket, bits, _ in x["by_repeat"]}
        body.append([x["label"], _whole(x["rows"]), _bits(x["overall"]), *(_bits(by.get(b)) for b in BUCKETS)])
    return table(["read with", "rows", "all", *BUCKETS], body)


def reread_together(path: Path = REREAD) -> str:
    """Models trained with one number of queries that choose together, read with others."""
    read: dict[str, dict[str, list[str]]] = {}
    for model, _, scored in _parts(path):
        for x in scored:
            if x["group"] == "choice" and x.get("overall") is not None and x["label"].startswith("hold="):
                read.setdefault(model, {}).setdefault(x["label"], []).append(_bits(x["overall"]))
    several = sorted({label for at in read.values() for label in at if "," not in label}, key=lambda x: int(x[5:]))
    body = [[model, *(" / ".join(at.get(label, ())) for label in several)] for model, at in read.items()]
    return table(["attention", *(f"read with {label}" for label in several)], body)


def answers(path: Path = ASKED) -> str:
    """Share of right answers by length."""
    found = recall.merged(json.loads(path.read_text(encoding="utf-8")))
    tested = sorted({n for m in found.values() for n in m["lengths"]})
    body = []
    for label, m in found.items():
        at = m["lengths"]
        each = {n: " / ".join(f"{x:.1%}" for x in at[n]["seeds"]) for n in tested if n in at}
        body.append([name(label), *(each.get(n, "") for n in tested),
                     *(_whole(at[n]["rows"]) if n in at else "" for n in (tested[0], tested[-1]))])  # fmt: skip
    headings = [*(f"{n:,}" for n in tested), f"rows at {tested[0]:,}", f"rows at {tested[-1]:,}"]
    return table(["attention", *headings], body)


def asked(path: Path = REASKED) -> str:
    """Share of right answers of trained models that were read with other fields."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return _read({
        (name(part["checkpoint"][1]), x["label"], x["length"]): f"{x['accuracy']:.1%}"
        for part in found.values() for x in part["found"] if x.get("accuracy") is not None
    })  # fmt: skip


def written() -> dict[str, str]:
    """Every table by the name of its spot."""
    compared, mechanisms, novels = of_fma(models()), others(models()), models(NOVELS)
    longer, together, windows = models(LONG), held(models()), models(LONG_WINDOWS)
    longest, grouped = models(LONGEST), models(GROUPED)
    return {
        "scores": scores(compared),
        "copies": copies(compared),
        "swept": scores(swept(models())),
        "swept-copies": copies({label: m for label, m in swept(models()).items() if label not in FIRST}),
        "held": scores(together),
        "held-copies": copies(together),
        "held-read": reread_together(),
        "askers": choices("several askers, seed 1"),
        "opened-afterwards": choices("full read opened, seed 1"),
        "long-windows": scores(windows, n=1 << 15),
        "long-windows-copies": copies(windows),
        "longer": scores(longer),
        "longer-copies": copies(longer),
        "longest": scores(longest),
        "longest-copies": copies(longest),
        "grouped": scores(grouped),
        "grouped-copies": copies(grouped),
        "grouped-read": reread_together(GROUPED_READ),
        "lengths": lengths(compared),
        "novels": scores(novels),
        "novel-copies": copies(novels),
        "mechanisms": scores(mechanisms, models(SHORT)),
        "mechanism-copies": copies(mechanisms),
        "reread": reread(),
        "choices": choices(),
        "two-layers": choices("lengths of opened without rotation, seed 1"),
        "masses": masses(),
        "asked": asked(),
        "answers": answers(),
        "passed": answers(PASSED),
        "passed-longer": answers(PASSED_LONG),
    }


def _seeds(m: Mapping[str, Any] | None) -> str:
    return "" if m is None else " / ".join(f"{bits:.3f}" for bits in m["seeds"].values())


def _bits(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}"


def _whole(x: float | None) -> str:
    return "" if x is None else f"{x:,.0f}"


if __name__ == "__main__":
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), written()), encoding="utf-8")
