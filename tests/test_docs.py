"""README, docs and examples: their code runs, their commands exist, their links lead somewhere, their numbers are the
records'."""

import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from farfield import mechanisms
from farfield.bench import records
from farfield.bench.records import Record
from farfield.cli import app
from farfield.cli.options import numbers, parse
from farfield.nn import ModelConfig
from farfield.testing.units import assert_within

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
# pages of other folders that name commands
OTHERS = [ROOT / "results" / "README.md"]


def name(path):
    return path.relative_to(ROOT).as_posix()


def load(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where inspect looks for classes
    spec.loader.exec_module(module)
    return module


def blocks(page, *languages):
    """(line, text) of the page's fenced blocks in one of these languages."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, re.S | re.M)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


def run(page):
    """Run the page's Python blocks in order, in one namespace, which is returned."""
    # classes in a page belong to a module of that name
    module = type(sys)(f"_{page.stem.lower()}")
    sys.modules[module.__name__] = module
    for line, text in blocks(page, "python"):
        # empty lines first, so that tracebacks name the line of the page
        exec(compile("\n" * line + text, str(page), "exec"), vars(module))
    return vars(module)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARFIELD_CACHE", str(tmp_path / "cache"))
    return tmp_path


# code


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_runs(page, elsewhere):
    run(page)


def test_the_postcard_is_one_mechanism_three_times(elsewhere):
    card = run(ROOT / "README.md")
    q, k, v = (card[x] for x in "qkv")
    exact = card["fma"].reference(q.double(), k.double(), v.double())
    for form in ("by_hand", "as_module"):
        assert_within(card[form], exact, terms=1024, name=form)
    assert_within(card["out"], exact[:, :, -1:], terms=1024, name="decoded")
    exact = mechanisms.make("fma").reference(q.double(), k.double(), v.double())
    assert_within(card["drop_in"], exact, terms=1024, name="drop_in")


def test_example_train(elsewhere, capsys):
    (elsewhere / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    found = load(ROOT / "examples" / "train.py").main(["text.txt"], tokens=256, batch=1, steps=2, width=32, quiet=True)
    assert 0 < found.bits_per_byte < 20
    assert "held out" in capsys.readouterr().out


def test_example_decode(elsewhere):
    out, whole = load(ROOT / "examples" / "decode.py").main(tokens=300, new=8, chunk=77)
    assert_within(out, whole.double(), terms=300)


def test_example_own_mechanism(elsewhere):
    assert load(ROOT / "examples" / "own_mechanism.py").main() > 10


# commands

GROUP = typer.main.get_command(app)


def command_lines():
    """Every `farfield ...` of the pages: in shell blocks, indented, or in the text."""
    found = []
    for page in [*PAGES, *OTHERS]:
        # a line that ends with a backslash goes on
        text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
        shell = [line for _, block in blocks(page, "sh", "bash", "console") for line in block.splitlines()]
        indented = re.findall(r"^ {4}(farfield .*)$", text, re.M)
        inline = re.findall(r"`(farfield [^`]+)`", text)
        found += [
            pytest.param(line, id=f"{name(page)}: {line.partition('  ')[0]}")
            for line in dict.fromkeys([*shell, *indented, *inline])
            if line.startswith("farfield ")
        ]
    return found


@pytest.mark.parametrize("line", command_lines())
def test_command_is_valid(line):
    _, *words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    # `farfield show NAME --plot FILE` is a form; what stands for itself is parsed
    if words[0] == "COMMAND":
        return
    command, *arguments = words
    chosen = GROUP.commands[command]
    options = {flag for option in chosen.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    assert not (wrong := [w for w in arguments if w.startswith("--") and w.partition("=")[0] not in options]), wrong
    if not arguments or any(w.isupper() for w in arguments):
        return
    given = chosen.make_context(command, arguments, parent=GROUP.make_context("farfield", [command])).params
    # what is looked at only when the command runs
    if command == "bench" and given["tokens"]:
        numbers(given["tokens"], "--tokens")
    if command == "train":
        ModelConfig.from_dict(parse(list(given["model"] or ()), "--model"))
        mechanisms.make(given["attention"] or "fma", **parse(list(given["option"] or ())))
    if command == "show" and given["name"] in mechanisms.names():
        mechanisms.make(given["name"], **parse(list(given["option"] or ())))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make (\w+)", page.read_text(encoding="utf-8"), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{name(page)}: make {target}"


# links


def anchors(page):
    """What headings of a page can be linked to."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)}: no {target}"
        assert there.is_relative_to(ROOT / "docs") or page.name == "README.md", (
            f"{name(page)}: {target} is not published"
        )
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name(page)}: no heading for {target}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"^  - .*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {page.name for page in PAGES if page.parent.name == "docs"}


def test_python_interface_names_what_exists():
    for target in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.M):
        parent, _, last = target.rpartition(".")
        module = importlib.import_module(parent)
        assert hasattr(module, last) or importlib.util.find_spec(target), f"docs/api.md: no {target}"


# pictures


@pytest.fixture(scope="module")
def pictures():
    return load(ROOT / "docs" / "pictures.py")


@pytest.mark.parametrize("which", ["multipole", "window", "strided", "sharded", "powers", "sorted"])
def test_picture_is_up_to_date(which, pictures):
    path = ROOT / "docs" / "pictures" / f"{which}.svg"
    drawn = pictures.svg(pictures.PICTURES[which]())
    assert path.read_text(encoding="utf-8") == drawn, "run: python docs/pictures.py"
    ElementTree.fromstring(drawn)


def test_plots_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    plots = load(ROOT / "docs" / "plots.py")
    models = plots.shown()
    assert [name for name in plots.NAMES.values() if name in models] == list(models)
    assert {"full", "fma", "near field alone"} < set(models)
    assert {path.stem for path in (ROOT / "docs" / "plots").iterdir()} == set(plots.figures(models))


def test_tables_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    tables = load(ROOT / "docs" / "quality_tables.py")
    page = tables.PAGE.read_text(encoding="utf-8")
    found = tables.written()
    assert {"scores", "copies", "lengths"} <= set(found)
    assert tables.put(page, found) == page, "run: python docs/quality_tables.py"
    models = tables.models()
    # as the record says it
    record = json.loads(tables.COMPARED.read_text(encoding="utf-8"))["runs"]["window:width=256 seed 0"]
    assert f"| window 256 | {record['rows']:,.0f} | {record['overall']:.3f} | {record['early']:.3f} |" in page
    assert all(", cut" not in label for label in models)
    assert tables.put(page.replace("| near field alone |", "| ? |"), found) == page


def test_tables_of_kernels_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    found = load(ROOT / "docs" / "kernel_tables.py")
    page = found.PAGE.read_text(encoding="utf-8")
    assert found.put(page, found.written()) == page, "run: python docs/kernel_tables.py"
    (last,) = [
        r for r in found.load("fma-long") if r.contender == "fma-long" and r.tokens == 1 << 20 and "+" in r.passes
    ]
    assert f"{last.ratio:.0f}x |\n\n<!-- long: stop" in page
    changed = page.replace(f"{last.ratio:.0f}x |\n\n<!-- long: stop", "1x |\n\n<!-- long: stop")
    assert changed != page
    assert found.put(changed, found.written()) == page
    with pytest.raises(ValueError, match="no spot for a table"):
        found.put(page.replace("<!-- floor: stop", "<!-- "), found.written())


def test_there_is_no_other_picture(pictures):
    assert {path.stem for path in (ROOT / "docs" / "pictures").iterdir()} == set(pictures.PICTURES)


def test_the_multipole_picture_covers_every_pair_once(pictures):
    tokens = pictures.TOKENS
    times = torch.zeros(tokens, tokens, dtype=torch.long)
    for box in pictures.multipole().boxes:
        times[box.first : box.last, box.start : box.stop] += 1
    assert torch.equal(times, torch.ones_like(times).tril())


def test_the_window_picture_is_the_window(pictures):
    i, j = torch.arange(pictures.TOKENS)[:, None], torch.arange(pictures.TOKENS)
    read = torch.zeros(pictures.TOKENS, pictures.TOKENS, dtype=torch.bool)
    for box in pictures.window(width=7, sinks=3).boxes:
        if box.shade == 0:
            read[box.first : box.last, box.start : box.stop] = True
    assert torch.equal(read, (j <= i) & ((i - j < 7) | (j < 3)))


# measured numbers


@pytest.fixture(scope="module")
def tables():
    return load(ROOT / "docs" / "tables.py")


def test_the_table_is_what_the_records_say(tables):
    shown = tables.between((ROOT / "README.md").read_text(encoding="utf-8"))
    if not tables.files():
        assert shown == tables.PLACEHOLDER
        pytest.skip("no record of the README's case yet")
    assert shown == tables.render(), "run: python docs/tables.py"


def measured(tokens, contender, passes="forward", seconds=0.01, **other):
    env = {
        "command": "farfield bench fma --device cpu", "commit": "0123456789abcdef", "dirty": False,
        "date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "Some CPU", "cores": 2},
        "versions": {"torch": "2.13.0"}, "threads": 2,
    }  # fmt: skip
    own = {"ratio": 0.5 * tokens / 1024, "against": "sdpa"} if contender == "fma" else {"backend": "flash_attention"}
    made = Record("fma", contender, passes, "float32", {"tokens": tokens}, times={"median": seconds}, memory=tokens)
    made = replace(made, env=env)
    return replace(made, **{**own, **other})


def test_a_table_from_records(tables, tmp_path):
    path = tmp_path / "results" / "cpu-2core" / "fma.jsonl"
    records.append(path, measured(1024, "fma", seconds=0.5), measured(1024, "sdpa"))  # an earlier run
    records.append(path, measured(1024, "fma"), measured(1024, "sdpa", seconds=0.005))
    records.append(path, measured(65536, "fma"), measured(65536, "sdpa", status="skipped", times={}))
    failed = measured(1024, "fma", "forward+backward", status="failed", reason="check", times={}, ratio=None)
    records.append(path, failed, measured(1024, "sdpa", "forward+backward"))
    other = measured(1024, "fma", seconds=9.0)
    records.append(path, replace(other, params={"tokens": 1024, "rank": 16}))
    shown = tables.render(tmp_path)
    link = "results/cpu-2core/fma.jsonl"
    assert shown.splitlines()[0] == (
        "| n | float32, forward | float32, forward + backward | extra memory, float32, forward + backward |"
    )
    assert (
        f"| 1,024 | [0.50x]({link}#L3) 10.0 ms / 5.00 ms | [failed]({link}#L7) failed / 10.0 ms | failed / 1.0 KiB |"
        in shown
    )
    assert f"| 65,536 | [32.0x]({link}#L5) 10.0 ms / skipped |  |  |" in shown
    assert "9.00 s" not in shown
    assert "500 ms" not in shown
    for said in ("Some CPU", "2 threads", "PyTorch 2.13.0", "2026-01-02", "0123456789", "`farfield bench fma", "flash"):
        assert said in shown
    readme = tables.put(f"a\n{tables.START}\nold\n{tables.STOP}\nb\n", shown)
    assert tables.between(readme) == shown
    assert (readme[:2], readme[-3:]) == ("a\n", "\nb\n")


def test_no_records_no_table(tables, tmp_path):
    assert tables.render(tmp_path) == tables.PLACEHOLDER
    with pytest.raises(ValueError, match="no table"):
        tables.between("nothing here")


# pages of mechanisms


@pytest.fixture(scope="module")
def pages():
    return load(ROOT / "docs" / "mechanism_pages.py")


@pytest.mark.parametrize("which", mechanisms.names())
def test_a_mechanism_has_a_page_whose_code_runs(which, pages):
    text = pages.page(which, pictured=False)
    kind = mechanisms.get(which)
    assert kind.paper.title in text
    assert all(f"`{option}`" in text for option in inspect.signature(kind).parameters)
    names = {}
    exec(re.search(r"^```python\n(.*?)^```$", text, re.S | re.M)[1], names)
    assert names["out"].shape == names["q"].shape


def test_pictures_of_mechanisms(pages):
    assert "<svg" in pages.svg("window")
    assert pages.svg("full") is None
