"""One more mechanism: `farfield new` writes it into a folder of its own, and it passes the contract untouched."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run(*command, folder):
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"FARFIELD_MECHANISMS": str(folder)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_a_new_mechanism_passes_the_contract_with_no_other_file_edited(tmp_path):
    def sources():
        return {path: path.read_bytes() for path in (TESTS.parent / "farfield").rglob("*.py")}

    before, folder = sources(), tmp_path / "mine"
    run("-m", "farfield", "new", "forty-six", "--folder", str(folder), folder=folder)
    assert [path.name for path in folder.iterdir()] == ["forty_six.py"]
    assert "class FortySix(" in (folder / "forty_six.py").read_text()
    said = run(
        "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "forty-six and not compiles",
        str(TESTS / "test_contract.py"), folder=folder,
    )  # fmt: skip
    # both of its cases went through everything that it declares, decoding included
    assert "failed" not in said
    assert int(said.split(" passed")[0].split()[-1]) >= 40
    assert sources() == before


# one mistake each, and the checks that must see it
MISTAKES = {
    "causal=True)\n": ("causal=False)\n", ["never_reads_the_future", "forward_float32"]),
    "layout, scale=self.scale).out": (
        "layout, scale=1.01 * q.shape[3] ** -0.5).out",
        ["forward_float32", "forward_bfloat16", "lengths"],
    ),
    "end = start + q.shape[2]\n": (
        "end = start + q.shape[2]\n        if state is not None: state.k.zero_()\n",
        ["state_is_immutable", "state_api"],
    ),
    "return out, Recent(end,": ("return out, Recent(start,", ["extend_equals_forward"]),
    "layout = self._layout(q.shape[2], k.shape[2]": (
        "q = q + 1e-3 * q.mean(0, keepdim=True)\n        layout = self._layout(q.shape[2], k.shape[2]",
        ["batch_independence", "forward_float32"],
    ),
    "Supports(noncausal=False)": (
        "Supports(noncausal=False, packed=True, rotary=True, cross=True)",
        ["packed_documents", "all_padding", "rotary"],
    ),
}

SCRIPT = """
import json, sys
from farfield import mechanisms
from farfield.testing import contract
unseen = []
for name, checks in json.loads(sys.argv[1]).items():
    case = mechanisms.get(name).cases[0]
    for check in checks:
        try:
            getattr(contract, "check_" + check)(name, case)
        except Exception:
            continue
        unseen.append(name + ": " + check)
print(json.dumps(unseen))
"""


def test_the_contract_sees_what_is_wrong(tmp_path):
    """The template with one mistake at a time."""
    run("-m", "farfield", "new", "right", "--folder", str(tmp_path), folder=tmp_path)
    right, wanted = (tmp_path / "right.py").read_text(), {}
    for i, (old, (new, checks)) in enumerate(MISTAKES.items()):
        assert old in right, f"the template no longer has {old!r}"
        (tmp_path / f"wrong_{i}.py").write_text(right.replace(old, new))
        wanted[f"wrong-{i}"] = checks
    assert json.loads(run("-c", SCRIPT, json.dumps(wanted), folder=tmp_path)) == []
