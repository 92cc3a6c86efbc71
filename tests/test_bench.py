"""Benchmarks: records, interleaving, failures, memory, the FMA case, all mechanisms, figures."""

import itertools
import json
import math
import os
import platform
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

from farfield import mechanisms
from farfield.bench import attend_random, fma, fma_decode, memory, plots, records, runner, tables, worker
from farfield.bench import mechanisms as all_mechanisms
from farfield.bench.records import Record
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within


def record(tokens=1024, contender="fma", passes="forward", seconds=0.01, density=None, **other):
    times = {"min": seconds, "q10": seconds, "median": seconds, "q90": 1.2 * seconds, "max": 2 * seconds, "samples": 3}
    values = {"ratio": 2.0, "against": "sdpa"} if contender == "fma" else {"backend": "flash_attention"}
    params = {"tokens": tokens, "heads": 1, **({} if density is None else {"density": density})}
    made = Record("fma", contender, passes, "float32", params, times=times, memory=1000 * tokens)
    return replace(made, **{**values, **other})


def grid():
    return [
        record(n, who, passes, seconds=1e-6 * n ** (1 if who == "fma" else 1.5))
        for passes in runner.PASSES
        for n in (1024, 4096, 16384)
        for who in ("fma", "sdpa")
    ]


@pytest.fixture
def cases(monkeypatch):
    """A registry of its own, so that a test can add cases."""
    runner.names()
    monkeypatch.setattr(runner, "BENCHES", dict(runner.BENCHES))
    monkeypatch.setattr(runner, "BASELINES", dict(runner.BASELINES))


# ------------------------------------------------------------------------------------------------------------ records


def test_records_come_back_as_written(tmp_path):
    path = tmp_path / "machine" / "fma.jsonl"
    given = [record(env=records.environment()), record(2048, status="failed", reason="no such thing", times={})]
    records.append(path, given[0])
    records.append(path, given[1])
    assert records.load(path) == given
    assert len(path.read_text().splitlines()) == 2


def test_concurrent_writers_do_not_mix(tmp_path):
    path = tmp_path / "fma.jsonl"
    threads = [
        threading.Thread(target=lambda n=n: [records.append(path, record(n, reason="x" * 5000)) for _ in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.tokens for r in records.load(path)) == sorted([0, 1, 2, 3] * 20)


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "fma.jsonl"
    records.append(path, record())
    with path.open("a") as file:
        file.write('{"bench": "fm\n')
    with pytest.raises(ValueError, match=r"fma.jsonl:2: not a benchmark record"):
        records.load(path)


def test_records_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.append(tmp_path / "fma.jsonl", record(seconds=math.nan))


def test_only_the_last_run_of_a_point_counts():
    old, new = record(seconds=1.0), record(seconds=2.0)
    assert records.latest([old, record(2048), new]) == [new, record(2048)]


def test_environment_says_where_without_saying_whose():
    env = records.environment()
    assert {"command", "commit", "dirty", "date", "machine", "versions", "threads", "load"} <= env.keys()
    assert env["machine"]["name"] == f"cpu-{records.cores()}core"
    assert env["versions"]["torch"] == torch.__version__
    host = platform.node()
    assert not host or host not in json.dumps(env)


def test_commit_is_unknown_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    assert records.commit() == {"commit": "unknown", "dirty": None}


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/farfield", "bench", "fma"], "farfield bench fma"),
        (["/x/farfield/__main__.py", "demo"], "farfield demo"),
        (["/x/run.py", "a b"], "python run.py 'a b'"),
    ],
)
def test_command_names_no_folder(monkeypatch, argv, command):
    monkeypatch.setattr("sys.argv", argv)
    assert records.command() == command


def test_machine_name_can_be_given(monkeypatch):
    monkeypatch.setenv("FARFIELD_MACHINE", "Old Laptop (2)")
    assert records.machine_name() == "old-laptop-2"
    assert records.results_path("fma", "results").parts == ("results", "old-laptop-2", "fma.jsonl")


def test_write_atomic_keeps_the_old_text_when_it_fails(tmp_path):
    path = tmp_path / "page.html"
    records.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        records.write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_known_allocation():
    def call():
        first = torch.ones(4_000_000)  # 16 MB, gone before the last
        second = torch.ones(1_000_000)
        del first
        return second, torch.ones(2_000_000)

    memory.measure(call)
    usage = memory.measure(call)
    assert usage.peak == 20_000_000
    # the process holds the touched pages, and whatever else it has grown by meanwhile
    assert usage.rss is None or usage.rss > 16_000_000
    assert usage.seconds > 0


def test_memory_sees_inside_operators():
    q, k, v = runner.draw(1024, "cpu", torch.float32, heads=1)
    fused = memory.measure(runner.sdpa((q, k, v), True).call)
    dense = memory.measure(lambda: (q @ k.mT).softmax(-1) @ v)
    assert dense.peak >= 2 * 1024 * 1024 * 4
    assert q.nbytes < fused.peak < dense.peak / 2


def test_memory_leaves_out_what_was_there():
    x = torch.ones(1_000_000)
    assert memory.measure(lambda: x.sum()).peak < 10_000


# ------------------------------------------------------------------------------------------------------------- timing


def test_rounds_are_interleaved_and_take_turns(monkeypatch):
    made = []
    monkeypatch.setattr(runner.memory, "measure", lambda call, device: memory.Usage(0, None, 0.01))
    found = runner.compare({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, seconds=0.12)
    assert made == ["a", "b", "b", "a"] * 3
    assert all(len(t.rounds) == 6 and t.summary()["samples"] == 6 for t in found.values())


def test_short_contenders_repeat_where_rounds_are_few(monkeypatch):
    cost, made = {"slow": 10.0, "fast": 0.1}, []
    monkeypatch.setattr(runner.memory, "measure", lambda call, device: memory.Usage(0, None, call()))
    calls = {who: (lambda who=who: made.append(who) or cost[who]) for who in cost}
    found = runner.compare(calls, seconds=1.0)
    assert [len(t.rounds) for t in found.values()] == [1, 1]
    assert [len(t.samples) for t in found.values()] == [1, 3]


def test_a_long_first_call_is_the_only_one(monkeypatch):
    made = []
    monkeypatch.setattr(runner.memory, "measure", lambda call, device: memory.Usage(7, None, call()))
    found = runner.compare({"long": lambda: made.append("long") or 9.0, "short": lambda: 0.01}, seconds=0.05, once=5.0)
    assert made == ["long"]
    assert found["long"].rounds == [[9.0]]
    assert runner.ratio(found["long"], found["short"]) > 100


def test_ratio_is_taken_within_rounds():
    # the machine is ten times slower in the second round, for both
    base, own = runner.Timing([[2.0], [20.0], [2.0]]), runner.Timing([[1.0], [10.0], [1.0]])
    assert runner.ratio(base, own) == 2.0
    assert runner.ratio(runner.Timing(), own) is None


def test_one_failure_leaves_the_others():
    def fails():
        raise RuntimeError("out of\n memory")

    found = runner.compare({"bad": fails, "good": lambda: torch.ones(3)}, seconds=0.01)
    assert found["bad"].error == "RuntimeError: out of memory"
    assert not found["bad"].rounds
    assert found["good"].rounds


def test_a_failure_after_the_first_call_is_one_too():
    calls = iter(range(100))

    def fails_later():
        if next(calls) == 4:
            raise RuntimeError("now")

    found = runner.compare({"bad": fails_later, "good": lambda: None}, seconds=0.01)
    assert found["bad"].error == "RuntimeError: now"
    assert found["bad"].summary() == {}


# ------------------------------------------------------------------------------------------------------------- runner


def test_a_run_is_checked_timed_and_recorded(tmp_path):
    made = runner.run(
        "fma", tokens=[96, 200], heads=2, width=16, block=16, near=32, rank=4, seconds=0.02, most=2, out=tmp_path
    )
    assert made == records.load(records.results_path("fma", tmp_path))
    assert len(made) == 2 * 2 * 2 * 2  # lengths, dtypes, passes, contenders
    assert not tables.notes(made)
    for r in made:
        own = r.contender == "fma"
        assert r.status == "ok"
        assert r.seconds > 0
        assert r.memory
        assert r.flops
        assert (r.ratio is not None) == own
        assert r.against == ("sdpa" if own else None)
        assert (r.check is not None) == own
        assert r.backend == ("" if own else "flash_attention")
        assert r.env["machine"]["name"]
    assert set(runner.memory_slopes(made)) == {
        (who, passes, dtype) for who in ("fma", "sdpa") for passes in runner.PASSES for dtype in ("float32", "bfloat16")
    }


def test_a_case_that_cannot_be_made_is_recorded_as_failed(cases):
    @runner.bench("broken", over={"tokens": [8]})
    def broken(tokens, device, dtype):
        raise NotImplementedError("no implementation\n  triton: needs a GPU")

    (made,) = runner.run("broken", dtypes=["float32"], passes=["forward"], out=None)
    assert (made.status, made.reason) == ("failed", "NotImplementedError: no implementation triton: needs a GPU")
    assert tables.notes([made]) == [f"broken forward float32 n=8 failed: {made.reason}"]
    assert tables.rows([made])[0][3] == "failed"


def test_a_wrong_result_is_not_timed(cases):
    timed = []

    def check(passes):
        raise AssertionError("out is off by 40.0 units")

    @runner.bench("wrong", over={"tokens": [8]})
    def wrong(tokens, device, dtype):
        q, k, v = runner.draw(tokens, device, dtype)
        return runner.Work(call=lambda: timed.append(1) or q, inputs=(q, k, v), check=check)

    own, base = runner.run("wrong", dtypes=["float32"], passes=["forward"], seconds=0.01, out=None)
    assert own.status == "failed"
    assert own.reason == "check: AssertionError: out is off by 40.0 units"
    assert not timed
    assert base.status == "ok"


def test_rivals_floors_and_rates(cases, monkeypatch):
    monkeypatch.setattr(runner, "CEILINGS", {records.machine_name(): (1e9, 1e9)})

    @runner.bench("rates", over={"tokens": [8], "density": [0.5]}, against=("other", "sdpa"), axis="density")
    def rates(tokens, device, dtype, density):
        q, k, v = runner.draw(tokens, device, dtype)
        other = runner.Work(call=lambda: q + k, inputs=(q, k), setup=0.5, backend="plus")
        return runner.Work(
            call=lambda: q * k * v,
            inputs=(q, k, v),
            rivals={"other": lambda: other},
            setup=0.25,
            floor=lambda passes: (4e3, 1e3),
            rates=lambda passes, seconds, others: {"others": len(others), "each": seconds / seconds},
        )

    made = runner.run("rates", dtypes=["float32"], passes=["backward"], seconds=0.01, most=2, out=None)
    assert [r.status for r in made] == ["ok"] * 3
    own, other, _ = made
    assert set(own.ratios) == {"other", "sdpa"}
    assert own.ratio == own.ratios["other"]
    assert (own.setup, other.setup, other.backend) == (0.25, 0.5, "plus")
    assert own.floor["seconds"] == 4e-6
    assert own.floor["share"] == pytest.approx(4e-6 / own.seconds)
    assert own.rates == {"others": 2, "each": 1}
    alone = runner.run("rates", dtypes=["float32"], passes=["forward"], against=(), seconds=0.01, most=2, out=None)
    assert [r.contender for r in alone] == ["rates"]


def test_a_step_is_run_as_it_is(cases):
    modes = []

    @runner.bench("steps", over={"tokens": [8]}, against=(), passes=runner.STEP)
    def steps(tokens, device, dtype):
        return runner.Work(call=lambda: modes.append(torch.is_grad_enabled()) or torch.ones(1))

    (made,) = runner.run("steps", dtypes=["float32"], seconds=0.01, most=2, out=None)
    assert (made.status, made.passes) == ("ok", "step")
    assert all(modes)
    with pytest.raises(ValueError, match="no passes 'forward'; there are step"):
        runner.run("steps", passes=["forward"], out=None)


def test_a_failed_baseline_is_shown_as_failed(cases):
    @runner.baseline("absent")
    def absent(inputs, causal):
        raise RuntimeError("not installed")

    @runner.bench("lonely", over={"tokens": [8]}, against=("absent", "sdpa"))
    def lonely(tokens, device, dtype):
        q, k, v = runner.draw(tokens, device, dtype)
        return runner.Work(call=lambda: q * 1, inputs=(q, k, v))

    own, base, other = runner.run("lonely", dtypes=["float32"], passes=["forward"], seconds=0.01, out=None)
    assert (base.status, base.reason) == ("failed", "RuntimeError: not installed")
    assert own.status == other.status == "ok"
    assert own.against == "sdpa"


def test_long_baselines_are_skipped_and_say_so(cases):
    made = runner.run(
        "full", tokens=[64, 4096], dtypes=["float32"], passes=["forward"], heads=1, seconds=0.01,
        max_baseline_seconds=1e-7, out=None,
    )  # fmt: skip
    status = {(r.contender, r.tokens): r.status for r in made}
    assert status == {("full", 64): "ok", ("sdpa", 64): "ok", ("full", 4096): "ok", ("sdpa", 4096): "skipped"}
    assert made[-1].reason.endswith("more than the 1e-07 s allowed")
    assert made[-2].ratio is None


def test_any_mechanism_has_a_benchmark():
    assert set(mechanisms.names()) <= set(runner.names())
    assert "window" in runner.get("window").about


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fmaa"}, "no benchmark 'fmaa'; there are .*fma"),
        ({"name": "fma", "bloc": 3}, "no option 'bloc'; its options are tokens, .*block"),
        ({"name": "fma", "dtypes": ["float8"]}, "no dtype 'float8'; there are .*float32"),
        (
            {"name": "fma", "passes": ["sideways"]},
            r"no passes 'sideways'; there are backward, forward, forward\+backward",
        ),
        ({"name": "fma", "passes": ["step"]}, "no passes 'step'"),
        ({"name": "fma", "against": ["sdp"]}, "no baseline 'sdp'; there are .*sdpa"),
        ({"name": "fma", "device": "tpu?"}, "no device"),
    ],
)
def test_refusals_say_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        runner.run(**arguments)


@pytest.mark.parametrize("name", mechanisms.names())
def test_mechanisms_say_what_they_read(name):
    for case in mechanisms.get(name).cases:
        mechanism = mechanisms.make_for(
            name, case.options, heads=case.heads, kv_heads=case.kv_heads, width=case.width, value_width=case.value_width
        )
        for tokens in (1, case.block, case.tokens):
            read = mechanism.rows_read(tokens)
            # nsa has three softmaxes, each of which may read a token
            # and a strictly causal first token reads nothing
            assert read is None or (tokens == 1) + read > 0, (case, tokens, read)
            assert read is None or read <= (3 if name == "nsa" else 1) * tokens, (case, tokens, read)


def test_rows_read_of_fma():
    fma = mechanisms.make("fma", block=16, near=16, rank=4, sinks=3)
    # 4 diagonal and 3 previous near tiles; the last two blocks read 1 and 2 groups of 4 rows, and 3 sinks
    pairs = 4 * 16 * 17 // 2 + 3 * 16 * 16 + 3 * 16 * 4 + 2 * 16 * 3
    assert fma.rows_read(64) == pytest.approx(pairs / 64)
    assert mechanisms.make("full").rows_read(64) == 32.5
    assert mechanisms.make("full", causal=False).rows_read(64) == 64


def test_slope_is_the_exponent():
    xs = [1024, 4096, 16384]
    assert runner.slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert math.isnan(runner.slope([1], [1]))


# ----------------------------------------------------------------------------------------------------------- FMA case


@pytest.mark.parametrize("near", [16, 48])
def test_literal_query_is_the_oracle(near):
    q, k, v = (normal(1, h, 150, 8, seed=s) for s, h in enumerate((4, 2, 2)))
    exact, _ = oracles.fma(q, k, v, block=16, near=near, rank=4, causal=True)
    for i in (0, 15, 16, 100, 149):
        assert_within(fma.literal(q, k, v, i, block=16, near=near, rank=4), exact[:, :, i : i + 1], terms=150)


@pytest.mark.parametrize("passes", runner.PASSES)
def test_check_refuses_another_mechanism(passes):
    work = fma.fma(300, "cpu", torch.float32, heads=1, width=8, block=16, near=32, rank=4)
    q, k, v = work.inputs

    def other(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert work.check
    assert work.check(passes)["queries"] == len(fma.SAMPLED)
    with pytest.raises(AssertionError, match="units at n=300, 3 allowed"):
        fma.check(other, q, k, v, passes, block=16, near=32, rank=4)


def test_flops_count_the_tiles_read():
    work = fma.fma(64, "cpu", torch.float32, heads=1, width=8, block=16, near=16, rank=4)
    # 4 diagonal and 3 previous near tiles; the last two blocks read 1 and 2 groups of 4 rows
    pairs = 7 * 16 * 16 + 3 * 16 * 4
    assert work.flops == 4 * 8 * pairs + 2 * 8 * 64


def test_the_floor_counts_what_is_seen():
    work = fma.fma(64, "cpu", torch.float32, heads=2, width=8, block=16, near=16, rank=4)
    # each query of a block sees i + 1 own tokens; the last three blocks 16 more, the last two 1 and 2 groups of 4
    pairs = 4 * 16 * 17 // 2 + 3 * 16 * 16 + 3 * 16 * 4
    assert work.floor
    tensor = 2 * 64 * 8 * 4
    assert work.floor("forward") == (4 * tensor, 4 * 2 * 8 * pairs)
    assert work.floor("forward+backward") == (12 * tensor, 3.5 * 4 * 2 * 8 * pairs)


# ---------------------------------------------------------------------------------------------------- the other cases

SMALL = {"seconds": 0.01, "most": 1, "out": None, "dtypes": ["float32"]}


def test_random_lists_are_checked_and_rated():
    options = {"tokens": 200, "heads": 2, "width": 16, "block": 32, "density": [0.5], "against": ["sdpa"]}
    made = runner.run("attend-random", **options, **SMALL)
    assert not tables.notes(made)
    for own, base in zip(made[::2], made[1::2], strict=True):
        # 4 of 7 blocks
        assert own.rates["read"] == pytest.approx(4 / 7)
        assert own.rates["efficiency"] == pytest.approx(base.seconds / own.seconds * 4 / 7)
        assert own.setup
        assert set(own.check["units"]) == {"out"} if own.passes == "forward" else {"out", "dq", "dk", "dv"}


def test_random_lists_are_ascending_and_of_one_length():
    layout = attend_random.random_layout(1000, 64, 0.25, 3, "cpu")
    assert layout.index.shape == (1, 3, 16, 4)
    assert (layout.index.diff(dim=-1) > 0).all()


def test_decoding_is_checked_against_extend():
    options = {"tokens": [150], "batch": [2], "heads": 4, "kv_heads": 2, "width": 16, "layers": 2, "against": []}
    (made,) = runner.run("fma-decode", **options, block=16, near=32, rank=4, **SMALL)
    assert made.status == "ok", made.reason
    assert made.rates["state bytes"] == made.rates["formula"]
    assert made.rates["us a layer"] == pytest.approx(1e6 * made.seconds)


def test_decoding_with_opened_groups_is_checked_against_extend():
    options = {"tokens": [150], "batch": [2], "open": [2], "heads": 4, "kv_heads": 2, "width": 16, "layers": 2}
    made = runner.run("fma-decode-opened", **options, against=[], block=16, near=32, rank=4, **SMALL)
    assert [x.status for x in made] == ["ok", "ok"], made[0].reason
    # tokens and what may follow in blocks, keys and values of two heads and two sequences in float32
    held = 4 * 2 * 2 * 2 * 16 * -(-(150 + fma_decode.SPARE) // 16) * 16
    here, there = (x.rates for x in made)
    assert (here["host bytes"], there["host bytes"]) == (0, held)
    assert here["device bytes"] - there["device bytes"] == held


def test_generating_is_timed_against_states_and_full_attention():
    shape = {"tokens": [150], "model": ["mixed"], "layers": 4, "width": 32, "heads": 2}
    made = runner.run("generate", **shape, against=["extend", "full"], **SMALL)
    assert [x.status for x in made] == ["ok"] * 3, made[0].reason
    for each in made:
        assert each.rates["tokens/s"] == pytest.approx(1 / each.seconds)
    own, states, full = (x.rates["state bytes"] for x in made)
    # room for what may follow
    assert states < own < full


@pytest.mark.parametrize("name", ["hip", "moba", "nsa", "ssa"])
def test_a_choice_is_timed_beside_its_forward(name):
    own, whole = runner.run("choosing", tokens=[150], mechanism=[name], width=[16], heads=4, **SMALL)
    assert (own.status, whole.status) == ("ok", "ok"), own.reason
    assert own.rates["share"] == pytest.approx(own.seconds / whole.seconds)


def test_other_mechanisms_do_not_choose():
    (made, *_) = runner.run("choosing", tokens=[64], mechanism=["window"], width=[16], **SMALL)
    assert made.status == "failed"
    assert "hip, moba, ssa, nsa" in made.reason


def test_a_training_step_is_timed(monkeypatch):
    # the code generator has its own tests
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    shape = {"layers": 1, "width": 16, "heads": 2, "block": 8, "near": 8, "rank": 2, "step_tokens": 64}
    own, full = runner.run("train-speed", tokens=32, **shape, **SMALL)
    assert (own.status, full.status) == ("ok", "ok")
    assert own.rates["tokens/s"] == pytest.approx(64 / own.seconds)
    assert own.rates["batch"] == 2


def test_points_show_what_varies(capsys):
    from rich.console import Console

    made = [
        record(
            density=x, ratios={"sdpa": 2.0}, rates={"efficiency": x}, setup=1e-3, floor={"seconds": 1e-3, "share": x}
        )
        for x in (0.5, 0.25)
    ]
    assert not tables.plain(made)
    Console(width=200).print(tables.points(made))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == [
        "dtype", "passes", "n", "density", "time", "memory", "efficiency", "set-up", "floor", "share", "/", "sdpa",
    ]  # fmt: skip
    assert "25%" in shown[2]


# ------------------------------------------------------------------------------------------------------------ figures


def figures():
    curves = {name: [(x, 8 - x / 1e5) for x in range(0, 400_000, 4096)] for name in ("fma", "window", "full")}
    return {
        "time": plots.time_figure(grid()),
        "memory": plots.memory_figure(grid()),
        "loss": plots.loss_figure(curves, points={"fma": (4e5, 4.0)}),
        "layout": plots.layout_figure(tokens=512, block=32, near=64, rank=4),
    }


def test_svg_stands_alone_and_takes_the_page_s_ink():
    seen = set()
    for name, figure in figures().items():
        text = plots.svg(figure, name)
        root = ElementTree.fromstring(text)
        assert root.get("aria-label") == name
        assert "http" not in text
        assert "currentColor" in text
        assert plots.INK not in text
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert len(ids) == len(set(ids))
        assert not seen.intersection(ids)
        seen.update(ids)
        for part in text.split("url(#")[1:]:
            assert part.partition(")")[0] in ids


def test_png_is_saved_whole(tmp_path):
    for name, figure in figures().items():
        path = plots.save(figure, tmp_path / f"{name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 4


def test_points_without_times_are_left_out_of_a_figure():
    plots.time_figure([*grid(), replace(record(65536), status="failed", times={}, memory=None)])
    with pytest.raises(ValueError, match="no records"):
        plots.time_figure([])


def test_a_figure_can_go_along_another_option():
    made = [record(density=x, seconds=x) for x in (0.1, 0.5)]
    ax = plots.time_figure(made, axis="density").axes[0]
    assert list(ax.lines[0].get_xdata()) == [0.1, 0.5]
    assert ax.get_xlabel() == "density"


def test_layout_picture_covers_the_past_once():
    """The boxes drawn for a query block are disjoint and cover every earlier token."""
    tokens, block = 512, 32
    figure = plots.layout_figure(tokens=tokens, block=block, near=64, rank=4)
    covered = torch.zeros(tokens // block, tokens)
    for collection in figure.axes[0].collections:
        for path in collection.get_paths():
            (x0, y0), (x1, _) = path.vertices.min(0), path.vertices.max(0)
            covered[int(y0) // block, int(x0) : int(x1)] += 1
    expected = torch.ones(tokens // block, tokens // block).tril().repeat_interleave(block, 1)
    assert torch.equal(covered, expected)


# ------------------------------------------------------------------------------------------------------------- tables


def test_rows_put_the_baseline_beside():
    row = dict(zip(tables.HEADINGS, tables.rows(grid())[0], strict=True))
    assert row["n"] == "1,024"
    assert row["time"] == "1.02 ms"
    assert row["baseline"] == "sdpa flash"
    assert row["its time"] == "32.8 ms"
    assert row["ratio"] == "2.00x"
    assert len(tables.rows(grid())) == 6


def test_the_terminal_table_fits_80_columns(capsys):
    from rich.console import Console

    console = Console(width=80)
    console.print(tables.table(grid()))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "16,384" in shown


@pytest.mark.parametrize(
    ("bytes_", "text"), [(None, ""), (0, "0 B"), (999, "999 B"), (1024, "1.0 KiB"), (123 << 20, "123 MiB")]
)
def test_sizes(bytes_, text):
    assert tables.size(bytes_) == text


@pytest.mark.parametrize(("seconds", "text"), [(12.34, "12.3 s"), (0.00123, "1.23 ms"), (2e-7, "0.20 µs")])
def test_seconds(seconds, text):
    assert tables.seconds(seconds) == text


def test_a_sample_cannot_steer_the_terminal():
    assert tables.visible("a\x1b[2Jb\n\tc\x00é") == "a\ufffd[2Jb\n\tc\ufffdé"


@pytest.mark.parametrize(("ratio", "text"), [(0.0048, "0.0048x"), (0.987, "0.99x"), (18.34, "18.3x"), (123.4, "123x")])
def test_ratios(ratio, text):
    assert tables.times(ratio) == text


# ----------------------------------------------------------------------------------------------------- all mechanisms

BROKEN = '''
"""It {verb}."""

from farfield.mechanism import Case, Mechanism, Paper


class {verb}(Mechanism):
    paper = Paper("A title", "Authors", 2020)
    cases = (Case(),)

    def forward(self, q, k, v, *, group=None, rotary=None):
        {body}

    def reference(self, q, k, v):
        return q
'''
TINY = all_mechanisms.Plan(tokens=[64, 128], width=[8], heads=2, dtypes=["float32"], passes=["forward"])


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Mechanisms that refuse and that are wrong, beside the real ones."""
    bodies = {"Refuses": 'raise NotImplementedError("no kernel")', "Errs": "return q + 1"}
    for verb, body in bodies.items():
        (tmp_path / f"{verb.lower()}.py").write_text(BROKEN.format(verb=verb, body=body))
    monkeypatch.setenv("FARFIELD_MECHANISMS", str(tmp_path))
    monkeypatch.setattr(mechanisms, "__path__", [*mechanisms.__path__, str(tmp_path)])
    monkeypatch.setattr(all_mechanisms, "CHECKED", 67)
    for cached in (mechanisms.names, mechanisms.get):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (mechanisms.names, mechanisms.get):
        cached.cache_clear()


def test_every_mechanism_is_measured_and_failures_are_shown(broken, tmp_path, capsys):
    chosen = [(name, {}) for name in ("refuses", "full", "errs")] + [("fma", {"block": 16, "near": 16, "rank": 4})]
    made = all_mechanisms.run_all(chosen, TINY, seconds=0.01, out=tmp_path / "out")
    assert made == records.load(records.results_path("mechanisms", tmp_path / "out"))
    own = {(r.contender, r.tokens): r for r in made if r.contender != "sdpa"}
    assert len(own) == 8
    assert own["refuses", 64].reason == "check: NotImplementedError: no kernel"
    assert own["errs", 128].reason.startswith("check: AssertionError: out is off by")
    for name in ("full", "fma"):
        r = own[name, 128]
        assert (r.status, r.bench, r.check["tokens"]) == ("ok", "mechanisms", 67)
        read = mechanisms.make(name, **dict(chosen)[name]).rows_read(128) / 64.5
        assert r.rates["read"] == pytest.approx(read)
        assert r.rates["efficiency"] == pytest.approx(r.ratio * read)
    assert own["full", 64].rates["read"] == 1
    assert own["fma", 64].params == {"tokens": 64, "width": 8, "heads": 2, "kv_heads": 2, **chosen[3][1]}

    from rich.console import Console

    Console(width=180).print(tables.mechanisms(made))
    shown = capsys.readouterr().out
    assert shown.count("failed") == 4
    beside = {(r.contender, r.tokens): base for r, base in itertools.pairwise(made) if base.contender == "sdpa"}
    for line in shown.splitlines():
        if line.startswith("full"):
            assert f"flash {tables.seconds(beside['full', 64].seconds)}" in line
    assert "fma (block=16, near=16, rank=4)" in shown
    labels = [t.get_text() for t in plots.mechanisms_figure(made).legends[0].get_texts()]
    assert labels == ["fma (block=16, near=16, rank=4)", "full", "sdpa, flash"]


def test_a_window_has_a_width_of_its_own():
    """Not that of the heads."""
    (made,) = all_mechanisms.run_all([("window", {"width": 9})], replace(TINY, tokens=[64]), out=None, against=[])
    assert made.params == {"tokens": 64, "width": 8, "heads": 2, "kv_heads": 2, "own_width": 9}
    assert made.rates["rows"] == mechanisms.make("window", width=9).rows_read(64)
    assert tables.label(made) == "window (width=9)"
    few = {"tokens": [64], "heads": 1, "dtypes": ["float32"], "passes": ["forward"], "out": None, "against": []}
    assert runner.run("window", width=9, head_width=16, **few)[0].bytes == 4 * 64 * 16 * 4
    assert runner.run("full", width=16, **few)[0].bytes == 4 * 64 * 16 * 4
    with pytest.raises(ValueError, match="window: no option widht; its options are width, sinks"):
        runner.run("window", widht=9, **few)


def test_a_run_goes_on_where_it_was_cut(broken, tmp_path, monkeypatch):
    chosen = [("refuses", {}), ("full", {})]
    options = {"seconds": 0.01, "out": tmp_path, "resume": True}
    first = all_mechanisms.run_all(chosen[1:], TINY, **options)
    measured = []
    again = all_mechanisms.run_all([*chosen, ("window", {})], TINY, progress=measured.append, **options)
    # what failed is tried again, what is there is not
    assert [text.split()[0] for text in measured] == ["refuses"] * 2 + ["window"] * 2
    full = [r for r in again if r.contender == "full"]
    assert full == [r for r in first if r.contender == "full"]


def test_a_process_that_ends_takes_only_its_work():
    from itertools import starmap

    with worker.Worker(own=True, limit=1.0) as made:
        with pytest.raises(worker.WorkError, match="its process ended with exit code 7"):
            list(made.run(starmap, os._exit, [(7,)]))
        with pytest.raises(worker.WorkError, match="ZeroDivisionError: "):
            list(made.run(starmap, divmod, [(1, 0)]))
        assert list(made.run(range, 3)) == [0, 1, 2]
        with pytest.raises(worker.WorkError, match="no answer within 1 s; its process was ended"):
            list(made.run(starmap, time.sleep, [(60,)]))


def test_what_took_a_process_down_is_not_tried_again(monkeypatch):
    def run(self, work, name, *args):
        if name == "fma":
            raise worker.WorkError("its process ended with exit code 7")
        return work(name, *args)

    monkeypatch.setattr(worker.Worker, "run", run)
    made = all_mechanisms.run_all([("fma", {}), ("full", {})], TINY, seconds=0.01, out=None, against=[])
    assert [(r.contender, r.status) for r in made] == [
        ("fma", "failed"), ("fma", "skipped"), ("full", "ok"), ("full", "ok"),
    ]  # fmt: skip
    assert made[1].reason == f"after {made[0].reason}"


def test_checks_compare_gradients():
    sizes = {"heads": 4, "kv_heads": 1, "width": 8}
    found = all_mechanisms.check("window", {"width": 9}, torch.float32, "cpu", "forward+backward", tokens=67, **sizes)
    assert (found["heads"], set(found["units"])) == (4, {"out", "dq", "dk", "dv"})


@pytest.mark.parametrize(
    ("ratios", "even"),
    [([0.5, 2.0], 2048), ([1.0, 2.0], 0), ([0.5, 0.9], math.inf), ([2.0, 0.25, 4.0], 8192), ([], None)],
)
def test_break_even(ratios, even):
    made = [record(1024 * 4**i, ratios={"sdpa": x}) for i, x in enumerate(ratios)]
    found = all_mechanisms.break_even(made)
    assert found == (pytest.approx(even) if even else even)


@pytest.mark.parametrize(
    ("takes", "counts"),
    [
        ([5.0, 5.0, 0.001, 0.001], 0.001),  # compiles at the second call
        ([0.4, 0.05, 0.001, 0.001], 0.001),  # records at the second call, in less than a long call
        ([9.0, 2.3, 2.3], 2.3),  # long, and agreed on
        ([2.3, 2.3, 2.2], 2.2),
    ],
)
def test_first_calls_of_a_gpu_do_not_say_what_a_call_costs(takes, counts, monkeypatch):
    took, costs = iter(takes), []
    monkeypatch.setattr(runner.memory, "measure", lambda call, device: memory.Usage(0, None, next(took)))
    monkeypatch.setattr(runner, "_samples", lambda call, device, repeats, cost: costs.append(cost) or [cost])
    found = runner.compare({"own": lambda: None}, device="cuda", seconds=0.1)["own"]
    assert found.usage.seconds == counts
    assert found.rounds == ([[counts]] if counts > 1 else [[x] for x in costs])
    assert next(took, None) is None
    assert all(x == counts for x in costs)
    assert bool(costs) == (counts < 1)
