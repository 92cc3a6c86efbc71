"""The command line: help, the mechanism commands, errors in one line, and train -> evaluate -> generate."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

from farfield import mechanisms
from farfield.cli import app, errors
from farfield.cli import mechanisms as commands
from farfield.cli import train as commands_train
from farfield.cli.budget import _varied as varied
from farfield.cli.options import numbers, parse
from farfield.testing import contract

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "demo",
    "train",
    "evaluate",
    "generate",
    "compare",
    "perplexity",
    "budget",
    "recall",
    "bench",
    "list",
    "find",
    "show",
    "new",
)

runner = CliRunner(env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1", "FARFIELD_DEBUG": None})


def farfield(*args: object, code: int = 0):
    """The result of a command line that must exit with `code`."""
    result = runner.invoke(app, [str(a) for a in args])
    if result.exit_code != code and result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def complaint(*args: object) -> str:
    """The one line of a command line that must fail with exit code 2."""
    result = farfield(*args, code=2)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("farfield: ")
    assert "Traceback" not in result.output
    return line.removeprefix("farfield: ")


# help


def test_help_names_every_command():
    text = farfield("--help").output
    assert all(re.search(rf"\b{name}\b", text) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(name):
    text = farfield(name, "--help").output
    assert "Examples" in text
    assert f"farfield {name}" in text.partition("Examples")[2]


def test_options_that_may_be_repeated_name_themselves():
    """Releases of typer derive different names for parameters that are lists."""
    options = 0
    for command in app.registered_commands:
        hints = get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            found = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, OptionInfo)]
            if found and "list" in str(hint.__origin__):
                options += 1
                # inside Annotated the first name stands in the place of a default
                names = (found[0].default, *(found[0].param_decls or ()))
                assert any(isinstance(x, str) and x.startswith("--") for x in names), (command.name, name)
    assert options


def test_version():
    assert farfield("--version").output.startswith("farfield 0.")


def test_unknown_command_suggests_the_nearest():
    assert "train" in farfield("trian", code=2).stderr


# mechanisms


def test_list_names_every_mechanism():
    text = farfield("list").output
    for name in mechanisms.names():
        assert name in text
        assert str(mechanisms.get(name).paper.year) in text


def test_mechanisms_md_is_up_to_date():
    assert (ROOT / "MECHANISMS.md").read_text(encoding="utf-8") == farfield("list", "--markdown").stdout, (
        "run: farfield list --markdown > MECHANISMS.md"
    )


def test_find_looks_into_papers_and_descriptions():
    assert "fma" in farfield("find", "multipole").output
    assert "full" in farfield("find", "VASWANI").output
    assert "full" not in farfield("find", "vaswani", "multipole-nonsense", code=2).stdout
    assert "did you mean vaswani" in complaint("find", "vaswany")


@pytest.mark.parametrize("name", mechanisms.names())
def test_show_tells_options_paper_and_cases(name):
    text = farfield("show", name).output
    kind = mechanisms.get(name)
    assert " ".join(kind.paper.title.split()[:2]) in text
    for option in inspect.signature(kind).parameters:
        assert f"{option}=" in text
    assert "cases" in text


def test_show_suggests_near_names():
    assert "did you mean fma" in complaint("show", "fmaa")


def test_show_draws_the_layout(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    farfield("new", "drawn-example", "--folder", folder)
    picture = tmp_path / "picture.png"
    commands.draw(load(folder / "drawn_example.py")(block=8), 40, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")

    class Plain:
        name = "plain"

    with pytest.raises(NotImplementedError, match="plain: offers no layout picture"):
        commands.draw(Plain(), 40, picture)


@pytest.mark.parametrize("name", [n for n in mechanisms.names() if hasattr(mechanisms.get(n), "layouts")])
def test_show_plot_writes_a_file(name, tmp_path):
    picture = tmp_path / f"{name}.svg"
    assert str(picture) in farfield("show", name, "--plot", picture, "--tokens", 600).output.replace("\n", "")
    assert "<svg" in picture.read_text()


# new


def load(path: Path):
    """The mechanism class of a file, under the module name that its registry name comes from."""
    spec = importlib.util.spec_from_file_location(f"farfield.mechanisms.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(
        c
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__ and hasattr(c, "cases")
    )


def test_new_writes_a_mechanism_that_passes_the_contract(tmp_path, monkeypatch):
    text = farfield("new", "my-attention", "--folder", tmp_path).output
    path = tmp_path / "my_attention.py"
    assert "FARFIELD_MECHANISMS" in text
    monkeypatch.setattr(mechanisms, "__path__", [*mechanisms.__path__, str(tmp_path)])
    for cached in (mechanisms.names, mechanisms.get):
        cached.cache_clear()
    try:
        kind = mechanisms.get("my-attention")
        assert kind.__name__ == "MyAttention"
        assert inspect.getfile(kind) == str(path)
        for case in kind.cases:
            for check in contract.CHECKS:
                # the compiler takes longer than everything else here; tracing finds what it would refuse
                check = contract.check_traces if check is contract.check_compiles else check
                if check is contract.check_traces or not contract.why_not(check, kind, case):
                    check("my-attention", case)
        assert "My attention" in farfield("show", "my-attention").output
        assert "my-attention" in farfield("list").output
        assert "my-attention already" in complaint("new", "my-attention", "--folder", tmp_path)
    finally:
        monkeypatch.undo()
        for cached in (mechanisms.names, mechanisms.get):
            cached.cache_clear()


def test_new_refuses_what_it_would_overwrite(tmp_path):
    farfield("new", "twice", "--folder", tmp_path)
    before = (tmp_path / "twice.py").read_text()
    (tmp_path / "twice.py").write_text(before + "# changed\n")
    assert "twice.py" in complaint("new", "twice", "--folder", tmp_path)
    assert (tmp_path / "twice.py").read_text().endswith("# changed\n")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("MyAttention", "try myattention"), ("my_attention", "try my-attention"), ("2d", "letter"), ("class", "letter")],
)
def test_new_refuses_bad_names(name, hint, tmp_path):
    message = complaint("new", name, "--folder", tmp_path)
    assert hint in message
    assert list(tmp_path.iterdir()) == []


def test_new_refuses_taken_names(tmp_path):
    assert "full already" in complaint("new", "full", "--folder", tmp_path)


# options


def test_options_are_json_where_they_are():
    got = parse(["block=32", "causal=false", "pool=mean", "scale=None", "kv-heads=2", "share=0.5"])
    assert got == {"block": 32, "causal": False, "pool": "mean", "scale": None, "kv_heads": 2, "share": 0.5}


@pytest.mark.parametrize("wrong", ["block", "=3", "a b=1"])
def test_options_without_a_value_are_refused(wrong):
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse([wrong])


def test_options_given_twice_are_refused():
    with pytest.raises(ValueError, match="twice"):
        parse(["block=1", "block=2"])


def test_numbers():
    assert numbers("1024,4k, 1M", "--tokens") == [1024, 4096, 1024**2]
    for wrong in ("", "4x", "-1", "0", "1,,2", "1.5k", "1km", "1kk"):
        with pytest.raises(ValueError, match="--tokens"):
            numbers(wrong, "--tokens")


LENGTHS = {
    "train": ["none.txt"],
    "evaluate": ["none"],
    "demo": ["--set", "minutes=1"],
    "show": ["fma", "--plot", "picture.none"],
}


@pytest.mark.parametrize("command", LENGTHS)
def test_a_length_is_a_number(command):
    assert "--tokens" in complaint(command, *LENGTHS[command], "--tokens", "4x")
    # then it is the other fault that is told
    assert "--tokens" not in complaint(command, *LENGTHS[command], "--tokens", "1k")


def test_one_value_to_vary():
    given = [("near-field", {}), ("fma", {"sinks": 4})]
    assert varied(given, "open=8") == [given[0], ("fma", {"sinks": 4, "open": 8})]
    with pytest.raises(ValueError, match="none of near-field has that option"):
        varied(given[:1], "open=8")


# errors


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/log.jsonl"), "run/log.jsonl: the disk is full"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "text.txt"), "text.txt: no such file or folder"),
        (FileNotFoundError(errno.ENOENT, "no such file, folder or glob", "*.c"), "*.c: no such file, folder or glob"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root"), "/root: permission denied"),
        (NotImplementedError("full: cannot do this"), "full: cannot do this"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers"), "pip install tokenizers"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_expected_errors_are_explained(error, words):
    message = errors.explain(error)
    assert message is not None
    assert words in message


@pytest.mark.parametrize("bug", [KeyError("x"), AttributeError("y"), RuntimeError("z"), AssertionError("w")])
def test_bugs_keep_their_traceback(bug):
    assert errors.explain(bug) is None


def test_debug_shows_the_traceback():
    result = runner.invoke(app, ["--debug", "show", "fmaa"])
    assert isinstance(result.exception, ValueError)


# train, evaluate, generate


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(700)))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FARFIELD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


TINY = (
    "--width", 32, "--layers", 1, "--heads", 2, "-o", "block=16", "-o", "near=16", "-o", "rank=4", "--tokens", 96,
    "--batch", 2, "--steps", 4, "--device", "cpu", "--eval-windows", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    """A run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    farfield("train", text, "--out", out, *TINY)
    return out


def test_train_leaves_a_checkpoint_and_a_log(run):
    assert (run / "step-000004" / "model.safetensors").exists()
    assert (run / "log.jsonl").read_text().count("\n") >= 2


def test_evaluate_prints_tables(run):
    text = farfield("evaluate", run, "--windows", 2).output
    assert "bits/byte" in text
    assert "last repeat" in text


def test_evaluate_prints_json(run, text):
    got = json.loads(farfield("evaluate", run, text, "--windows", 2, "--json", "--copy-probe", "-n", 160).stdout)
    assert got["windows"] == 2
    assert got["length"] == 160
    assert 0 < got["bits_per_byte"] < 12
    assert got["copy_probe"]
    changed = json.loads(
        farfield("evaluate", run, text, "--windows", 2, "--json", "-n", 160, "--model", "log_scale=16").stdout
    )
    assert changed["changes"] == {"log_scale": 16}
    assert changed["bits_per_byte"] != got["bits_per_byte"]
    assert "no field 'log_scal'" in complaint("evaluate", run, "--model", "log_scal=16")


def test_generate_streams_text(run, tmp_path):
    same = ("--tokens", 12, "--seed", 3, "--prompt", "7 times", "--quiet")
    first, second = (farfield("generate", run, *same).stdout for _ in range(2))
    assert first == second
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("7 times")
    echoed = farfield("generate", run, *same[:4], "--prompt-file", prompt, "--echo", "--quiet").stdout
    assert echoed == "7 times" + first
    piped = runner.invoke(app, ["generate", str(run), *map(str, same[:4]), "--prompt-file", "-", "-q"], input="7 times")
    assert piped.stdout == first


def test_resume_goes_on(run, text, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    farfield("train", "--out", out, "--resume", "--steps", 6)
    assert (out / "step-000006").exists()
    assert "width was 32 and is now 64" in complaint("train", "--out", out, "--resume", "--width", 64)
    assert "seed was 0 and is now 1" in complaint("train", "--out", out, "--resume", "--seed", 1)


def test_encoder_round_trip(text, tmp_path):
    out = tmp_path / "encoder"
    farfield("train", text, "--out", out, "--encoder", "--attention", "full", *TINY[:6], *TINY[12:], "-q")
    assert "bits/byte" in farfield("evaluate", out, "--windows", 2).output
    assert "encoder" in complaint("generate", out)
    assert "encoder" in complaint("evaluate", out, "--copy-probe")


def test_interrupted_training_saves_and_says_how_to_go_on(text, tmp_path):
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "farfield", "train", text, "--out", out, *TINY, "--steps", 100_000]
    process = subprocess.Popen([str(x) for x in command], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        for _ in range(600):
            if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text():
                break
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == errors.INTERRUPTED
    assert "--resume" in said
    assert "Traceback" not in said
    (saved,) = out.glob("step-*")
    farfield("train", "--out", out, "--resume", "--steps", int(saved.name[5:]) + 1)


def test_defaults_in_help_are_the_configs():
    from farfield.nn import ModelConfig
    from farfield.train import TrainConfig

    expected = {f.name: f.default for config in (ModelConfig, TrainConfig) for f in fields(config)}
    words = {"kv_heads", "tokenizer", "cache", "lr", "rest_lr", "compile", "graph"}  # defaults that help says in words
    seen = set()
    for name, hint in get_type_hints(commands_train.train, include_extras=True).items():
        help = getattr(hint, "__metadata__", (None,))[0]
        found = re.search(r"\[default: (.*?)\]", getattr(help, "help", None) or "")
        if found and name not in words:
            assert found[1] == str(expected[name]), name
            seen.add(name)
    assert len(seen) > 20


# what goes wrong


def test_missing_empty_and_short_text(tmp_path, text):
    out = tmp_path / "run"
    assert "no text given" in complaint("train", "--out", out)
    assert "nowhere.txt" in complaint("train", tmp_path / "nowhere.txt", "--out", out)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "is empty" in complaint("train", empty, "--out", out)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "the text is too short" in complaint("train", short, "--out", out, *TINY)
    assert not list(out.glob("step-*"))


def test_train_refuses_what_it_cannot_do(tmp_path, text, run):
    out = tmp_path / "run"
    assert "did you mean fma" in complaint("train", text, "--out", out, "--attention", "fmaa")
    assert "no such device" in complaint("train", text, "--out", out, *TINY, "--device", "cuda:77")
    assert "no such device" in complaint("train", text, "--out", out, *TINY, "--device", "abacus")
    assert "no option" in complaint("train", text, "--out", out, *TINY, "-o", "blocks=16")
    assert "multiple of heads" in complaint("train", text, "--out", out, "--width", 30, "--heads", 4)
    assert "did you mean conv" in complaint("train", text, "--out", out, "--model", "convs=3")
    assert "--resume" in complaint("train", text, "--out", run, *TINY)
    assert "no such checkpoint or run folder" in complaint("train", "--out", out, "--resume")
    assert "NAME=VALUE" in complaint("train", text, "--out", out, "-o", "block")
    assert not list(out.glob("step-*"))


def test_full_disk(tmp_path, text, monkeypatch):
    from farfield.train import checkpoint

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "disk is full" in complaint("train", text, "--out", tmp_path / "run", *TINY, "-q")


def test_wrong_checkpoints(tmp_path, run):
    assert "no such checkpoint" in complaint("evaluate", tmp_path / "nowhere")
    assert "no checkpoint here" in complaint("generate", tmp_path)
    state = json.loads((run / "step-000004" / "state.json").read_text())

    def changed(name: str, **values) -> Path:
        folder = tmp_path / name
        shutil.copytree(run / "step-000004", folder)
        (folder / "state.json").write_text(json.dumps(state | values))
        return folder

    assert "format 99" in complaint("generate", changed("newer", format=99))
    other = changed("other", model=state["model"] | {"width": 64})
    assert "has shape" in complaint("evaluate", other)
    (other / "model.safetensors").write_bytes(b"\0" * 100)
    assert "damaged" in complaint("evaluate", other)
    (other / "model.safetensors").unlink()
    assert "missing" in complaint("generate", other)


def test_generate_refuses_bad_arguments(run):
    assert "not both" in complaint("generate", run, "--prompt", "a", "--prompt-file", "b")
    assert "prompt is empty" in complaint("generate", run, "--prompt", "")
    assert "nowhere" in complaint("generate", run, "--prompt-file", "nowhere")
    assert "temperature" in complaint("generate", run, "--temperature=-1")
    assert "top_p" in complaint("generate", run, "--top-p", 2)
    assert "no such device" in complaint("generate", run, "--device", "cuda:77")


# bench and demo: what they do is tested with them


def test_bench_lists_measures_and_records(tmp_path):
    listed = farfield("bench", "--list").output
    assert all(name in listed for name in mechanisms.names())
    farfield("bench", "window", "--tokens", "128,256", "--dtype", "float32", "--passes", "forward", "--seconds", 0,
             "--out", tmp_path, "--device", "cpu")  # fmt: skip
    (records,) = tmp_path.rglob("window.jsonl")
    assert records.read_text().count("\n") == 4
    assert len(list(tmp_path.rglob("*.svg"))) == 2


def test_bench_refuses_bad_arguments():
    assert "name a benchmark" in complaint("bench")
    assert "no benchmark" in complaint("bench", "fmaa")
    assert "--tokens" in complaint("bench", "fma", "--tokens", "many")
    assert "no dtype" in complaint("bench", "fma", "--dtype", "int8")
    assert "no such device" in complaint("bench", "fma", "--device", "cuda:77")


def test_demo_passes_its_settings(tmp_path, monkeypatch):
    from farfield.bench import demo

    taken = {}
    monkeypatch.setattr(demo, "demo", lambda out, **settings: taken.update(settings, out=out))
    farfield("demo", "--out", tmp_path, "--minutes", 1, "--set", "layers=2", "--set", "lengths=[64,128]", "-n", 128)
    assert taken == {
        "out": tmp_path, "minutes": 1.0, "seed": 0, "layers": 2, "lengths": (64, 128), "tokens": 128,
    }  # fmt: skip
    assert "did you mean layers" in complaint("demo", "--set", "layer=2")
    assert "--minutes" in complaint("demo", "--set", "minutes=2")
