"""The demo in miniature, through the code path of the real one; and its page."""

import json
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from farfield.bench import demo as demos
from farfield.bench import records, report, runner
from farfield.bench.demo import Run, Settings, demo, standard_library

TINY = {
    "minutes": 0.5, "tokens": 256, "width": 16, "layers": 1, "heads": 1, "steps": 6, "scored": 2,
    "lengths": (128, 256), "prompt": 120, "sample": 30,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run: its folder and what it said."""
    said = StringIO()
    page = demo(tmp_path_factory.mktemp("demo") / "run", console=Console(file=said, width=80), **TINY)
    return page.parent, said.getvalue()


class Reader(HTMLParser):
    """Checks that tags close in order, and collects headings, ids and everything that could load something."""

    VOID = {"meta", "br", "hr", "img", "input", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.ids, self.loads, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data") and v[:1] != "#"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_page_is_whole_and_stands_alone(made):
    text = (made[0] / "report.html").read_text()
    page = Reader(text)
    assert text.startswith("<!doctype html>")
    assert not page.open
    assert not page.loads
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert "http" not in text
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_page_has_every_part(made):
    folder, _ = made
    text = (folder / "report.html").read_text()
    assert Reader(text).headings[1:] == [
        "What each query reads",
        "A language model on real text",
        "Time and memory",
        "A sample",
        "To repeat it",
    ]
    for label in ("Layout of causal", "Loss curves", "Time against length", "Memory against length"):
        assert f'aria-label="{label}' in text
    run = json.loads((folder / "demo.json").read_text())
    versions = run["env"]["versions"]
    for part in (versions["torch"], versions["python"], run["env"]["date"], ">Seed<", ">Command<", "1,536 bytes in 6"):
        assert part in text


def test_models_learn_from_equal_tokens(made):
    folder, said = made
    run = json.loads((folder / "demo.json").read_text())
    assert run["trained"] == {"steps": 6, "bytes": 6 * 256, "batch": 1, "tokens": 256}
    assert list(run["models"]) == ["fma", "window", "full"]
    for name, about in run["models"].items():
        assert (folder / about["checkpoint"] / "model.safetensors").exists()
        assert about["curve"][-1][0] == 6 * 256
        assert 0 < about["overall"] < 9
        assert {"early", "late", "by_repeat", "by_position", "parameters", "speed"} <= about.keys()
        assert f"{about['overall']:.3f}" in said, name
    assert len({about["parameters"] for about in run["models"].values()}) == 1
    assert "1,536 bytes each" in said


def test_every_length_is_measured(made):
    found = records.load(made[0] / "speed.jsonl")
    points = {(r.contender, r.passes, r.tokens) for r in found if r.status == "ok"}
    assert points == {(who, passes, n) for who in ("fma", "sdpa") for passes in runner.PASSES for n in (128, 256)}


def test_sample_comes_through_the_state(made):
    folder, said = made
    sample = json.loads((folder / "demo.json").read_text())["sample"]
    assert 0 < sample["new_tokens"] <= 30
    assert sample["state_bytes"] > 0
    assert 0 < len(sample["text"]) <= 30
    assert "4/4 Sample" in said


def test_nothing_is_left_behind(made):
    names = {p.name for p in made[0].iterdir()}
    assert names == {"demo.json", "speed.jsonl", "report.html", "text", "fma", "window", "full"}


def test_page_can_be_drawn_again(made):
    path = made[0] / "report.html"
    before = path.read_text()
    path.unlink()
    assert report.render(made[0]) == path
    assert path.read_text() == before


def test_page_of_records_alone(made, tmp_path):
    (tmp_path / "speed.jsonl").write_text((made[0] / "speed.jsonl").read_text())
    page = Reader(report.render(tmp_path).read_text())
    assert page.headings[1:] == ["Time and memory", "To repeat it"]
    with pytest.raises(FileNotFoundError, match=r"neither demo\.json nor speed\.jsonl"):
        report.render(tmp_path / "text")


def test_page_shows_markup_as_text(made, tmp_path):
    run = json.loads((made[0] / "demo.json").read_text())
    run["sample"]["text"] = "<script>\x1b[2J&"
    run["env"]["command"] = "farfield demo --out '<b>'"
    (tmp_path / "demo.json").write_text(json.dumps(run))
    text = report.render(tmp_path).read_text()
    assert "&lt;script&gt;\ufffd[2J&amp;" in text
    assert "script" not in Reader(text).tags


def test_a_stopped_run_keeps_what_it_has(tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "measure_attention", stop)
    said = StringIO()
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "run", console=Console(file=said, width=200), **TINY)
    assert "Stopped early" in said.getvalue()
    assert "What each query reads" in (tmp_path / "run" / "report.html").read_text()


def test_steps_follow_the_time_there_is(tmp_path, monkeypatch):
    """Twice the time per step gives half the steps, and all of them fit."""
    monkeypatch.setattr(demos, "MODELS", {"fma": {}})

    def steps(seconds):
        run = Run(tmp_path / str(seconds), Settings(minutes=5), Console(quiet=True))
        monkeypatch.setattr(run, "_step_seconds", lambda name: seconds)
        monkeypatch.setattr(run, "_configs", lambda name, steps: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train_models()
        return run.found["trained"]["steps"]

    slow, fast = steps(2.0), steps(1.0)
    assert 0.45 < slow / fast < 0.55
    assert 100 < fast < 300


def test_folders_are_never_written_twice(tmp_path):
    assert demos.free(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert demos.free(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run" / "mine").touch()
    (tmp_path / "run-2").touch()
    assert demos.free(tmp_path / "run") == tmp_path / "run-3"


def test_held_out_modules_are_held_out_whole(tmp_path):
    for name in ("email/mime/text.py", "email/parser.py", "json/decoder.py", "ast.py", "glob.py", "test/test_ast.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    train, valid, modules = standard_library(tmp_path)
    names = [p.relative_to(tmp_path).as_posix() for p in train]
    held = [p.relative_to(tmp_path).as_posix() for p in valid]
    assert (names, held) == (["ast.py", "json/decoder.py"], ["email/mime/text.py", "email/parser.py", "glob.py"])
    assert modules == ["email", "glob"]
    assert not {re.split(r"[/.]", n)[0] for n in names} & set(modules)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="minutes must be positive, got 0"):
        demo(tmp_path / "run", minutes=0)
    with pytest.raises(ValueError, match="needs tokens >= 64"):
        Settings(tokens=8)
    with pytest.raises(ValueError, match="no source of Python's standard library"):
        standard_library(tmp_path)
