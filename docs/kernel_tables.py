"""The tables of docs/kernels.md that are read off records: python docs/kernel_tables.py writes them.

Each stands between two comment lines that name it; a test compares. The last record of a point counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import spots
from spots import short, table

from farfield.bench import records, tables
from farfield.bench.records import Record

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "results" / "h200"
put = partial(spots.put, script="docs/kernel_tables.py")

WIDTHS = (64, 128)
PASSES = {"forward": "forward", "both": "forward+backward"}
DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02)
MECHANISMS = (
    "s2-attention", "power-attention", "hip", "moba", "nsa", "ssa", "scfa", "scfa, dropping", "lightning-attention",
    "aaren",
)  # fmt: skip


def load(bench: str, *, failed: bool = False) -> list[Record]:
    """The points of a bench that were measured, and on demand those that failed."""
    there = records.latest(records.load(RESULTS / f"{bench}.jsonl"))
    return [r for r in there if r.status == "ok" or (failed and r.status == "failed")]


def random_lists(passes: str, cell: Callable[[Record], str]) -> str:
    """attend-random, a row for each size of block and width."""
    body = []
    own = [r for r in load("attend-random") if r.contender == "attend-random" and r.passes == passes]
    for block in (128, 64):
        for width in WIDTHS:
            at = {r.params["density"]: r for r in own if (r.params["block"], r.params["width"]) == (block, width)}
            body.append([f"{block} x {block}", str(width), *(cell(at[x]) if x in at else "" for x in DENSITIES)])
    return table(["blocks", "d", *(f"{x:.0%}" for x in DENSITIES)], body)


def efficiency(r: Record) -> str:
    return f"{r.rates['efficiency']:.2f} ({tables.times(r.ratios['flex'])})"


def rate(r: Record) -> str:
    return f"{r.rates['TFLOP/s']:.0f}: {efficiency(r)}"


def floor() -> str:
    """Shares of fma-floor."""
    heads = {1 << 15: 32, 1 << 17: 16, 1 << 20: 4}
    share = {(r.params["block"], r.tokens, r.passes, r.params["width"]): r.floor["share"] for r in load("fma-floor")}
    body = [
        [f"{block}, {rank}", f"{short(n)} x {h}",
         *(_two(share.get((block, n, passes, width))) for passes in PASSES.values() for width in WIDTHS)]
        for block, rank in ((64, 4), (128, 16)) for n, h in heads.items()
    ]  # fmt: skip
    return table(["block, rank", "tokens x heads", "forward d=64", "d=128", "forward + backward d=64", "d=128"], body)


def against_dense(bench: str) -> str:
    """Ratios of a bench of FMA over lengths."""
    own = [r for r in load(bench) if r.contender == bench and set(r.params) == {"tokens"}]
    lengths = sorted({r.tokens for r in own})
    ratio = {(r.passes, r.tokens): r.ratio for r in own}
    body = [[p.replace("+", " + "), *(_times(ratio.get((p, n))) for n in lengths)] for p in PASSES.values()]
    return table(["", *map(short, lengths)], body)


def mechanisms() -> str:
    """Ratio and efficiency of every mechanism with its defaults."""
    found = {}
    for r in load("mechanisms"):
        options = {k: v for k, v in r.params.items() if k not in ("tokens", "width", "heads", "kv_heads")}
        name = {"{}": r.contender, "{'choose': 'drop'}": f"{r.contender}, dropping"}.get(str(options))
        found[name, r.passes, r.params["width"], r.tokens] = r
    lengths = (1 << 13, 1 << 15, 1 << 17)
    body = [
        [name, said, str(width), *(_ratio(found.get((name, passes, width, n))) for n in lengths)]
        for name in MECHANISMS for said, passes in PASSES.items() for width in WIDTHS
    ]  # fmt: skip
    return table(["mechanism", "passes", "d", *map(short, lengths)], body)


def choosing() -> str:
    """Microseconds of the choice and its share of the forward."""
    own = [r for r in load("choosing") if r.contender == "choosing" and r.params["width"] == 128]
    lengths = [n for n in sorted({r.tokens for r in own}) if n != 1 << 14]
    at = {(r.params["mechanism"], r.tokens): r for r in own}
    body = [
        [name, *(f"{at[name, n].seconds * 1e6:,.0f} ({at[name, n].rates['share']:.0%})" if (name, n) in at else ""
                 for n in lengths)]
        for name in ("hip", "moba", "ssa", "nsa")
    ]  # fmt: skip
    return table(["", *map(short, lengths)], body)


def opened() -> str:
    """Ratios of fma-opened by who chooses and by rank and detail, the part of the choice in the forward, and growth."""
    own = [r for r in load("fma-opened") if r.contender == "fma-opened"]
    lengths = sorted({r.tokens for r in own})
    body = []
    for parts in sorted({_parts(r) for r in own}, reverse=True):
        kv_heads, hold, rank, detail = parts
        for said, passes in PASSES.items():
            for width in WIDTHS:
                point = passes, width, parts
                here = {r.tokens: r for r in own if (r.passes, r.params["width"], _parts(r)) == point}
                if not here:
                    continue
                shares = [r.rates["choosing share"] for r in here.values() if "choosing share" in r.rates]
                ends = (min(shares), max(shares)) if shares and passes == "forward" else ()
                share = " to ".join(dict.fromkeys(f"{x:.0%}" for x in ends))
                cells = [_times(here[n].ratio) if n in here else "" for n in lengths]
                cells += [share, _growth(here)]
                body.append([f"{kv_heads}, {hold}", f"{rank}, {detail}", said, str(width), *cells])
    headings = ["key heads, hold", "rank, detail", "passes", "d", *map(short, lengths), "share of choosing", "growth"]
    return table(headings, body)


def _growth(at: Mapping[int, Record]) -> str:
    """Exponent of the time from 32k to 1M tokens, where both were measured at one commit."""
    low, high = at.get(1 << 15), at.get(1 << 20)
    if low is None or high is None or low.env["commit"] != high.env["commit"]:
        return ""
    return f"n^{math.log(high.seconds / low.seconds, high.tokens / low.tokens):.2f}"


def _parts(r: Record) -> tuple[int, int, int, int]:
    """Key heads, queries of a run, and rows of a group and of a sketch."""
    heads = r.params.get("heads", 16)
    given = r.params.get("kv_heads", heads), r.params.get("hold", 64)
    return *given, r.params.get("rank", 4), r.params.get("detail", 16)


def decoding() -> str:
    """Microseconds a layer and bytes of state; a cache that was not allocated is counted."""
    found = {(r.contender, r.params["batch"], r.tokens): r for r in load("fma-decode")}
    names = ("fma-decode", "sdpa-decode", "sdpa-decode-flash")
    token = {r.rates["state bytes"] / batch / n for (name, batch, n), r in found.items() if name == "sdpa-decode"}
    (token,) = token
    body = []
    for batch, n in sorted({(batch, n) for _, batch, n in found}):
        here = [found.get((name, batch, n)) for name in names]
        took = ["" if r is None else _micro(r.rates["us a layer"]) for r in here]
        state = "" if here[0] is None else tables.size(here[0].rates["state bytes"])
        body.append([str(batch), short(n), *took, f"{state} / {tables.size(batch * n * token)}"])
    headings = ["sequences", "context", "FMA", "cuDNN", "FlashAttention-2", "bytes of state, FMA / cache"]
    return table(headings, body)


def training() -> str:
    """Thousand tokens a second and peak memory of train-speed."""
    found = {(r.contender, r.tokens): r for r in load("train-speed")}
    lengths = sorted({n for _, n in found})
    body = []
    for said, name in (("fma", "train-speed"), ("full", "full")):
        here = [found.get((name, n)) for n in lengths]
        body.append([said, *("" if r is None else f"{r.rates['tokens/s'] / 1e3:.0f}, {(r.memory or 0) / 2**30:.0f} GiB"
                             for r in here)])  # fmt: skip
    checkpointed = {r.tokens for r in found.values() if r.params.get("checkpoint")}
    return table(["", *(short(n) + ", checkpointed" * (n in checkpointed) for n in lengths)], body)


def written() -> dict[str, str]:
    """Every table by the name of its spot."""
    return {
        "random-forward": random_lists("forward", efficiency),
        "random-backward": random_lists("backward", rate),
        "floor": floor(),
        "long": against_dense("fma-long"),
        "short": against_dense("fma-short"),
        "mechanisms": mechanisms(),
        "choosing": choosing(),
        "opened": opened(),
        "decoding": decoding(),
        "training": training(),
    }


def _ratio(r: Record | None) -> str:
    if r is None:
        return ""
    read = r.rates.get("efficiency")
    return _times(r.ratio) + (f" ({read:.2f})" if read else "")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else tables.times(ratio)


def _two(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _micro(x: float) -> str:
    return f"{x:,.{0 if x >= 30 else 1}f}"


if __name__ == "__main__":
    records.write_atomic(PAGE, put(PAGE.read_text(encoding="utf-8"), written()))
    print(PAGE)
