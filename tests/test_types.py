"""Rows, Layout and Partial: what they hold, what they refuse, and the mask in the docstring."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from farfield.mechanism import Case, Paper, State, Supports
from farfield.select import static
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.types import Layout, Partial, Rows


def layout(index=((0, 1), (1, 9)), count=(2, 1), **changes):
    options = {"q_block": 2, "k_block": 3, "tokens": 4, "rows": 5} | changes
    return Layout(torch.tensor([[index]], dtype=torch.int32), torch.tensor([[count]], dtype=torch.int32), **options)


def test_the_docstring_rebuilds_the_dense_mask():
    """The loop of Layout's docstring, run as it stands there, gives the oracle's mask."""
    lines = Layout.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if "for i in range" in line)
    stop = next(i for i, line in enumerate(lines) if "mask[i, r]" in line) + 1
    code = "\n".join(line[8:] for line in lines[start:stop])
    for plan in (
        layout(),
        layout(causal=True),
        layout(causal=True, reach=2, sinks=1),
        static.window(tokens=19, width=4, sinks=2, block=4, causal=False),
    ):
        mask = torch.zeros(plan.tokens, plan.rows, dtype=torch.bool)
        group, row_group = torch.arange(plan.tokens) // 3, torch.arange(plan.rows) // 3
        names = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)} | {
            "mask": mask, "b": 0, "h": 0, "position": range(plan.tokens), "end": range(plan.rows),
            "query_group": group, "row_group": row_group,
        }  # fmt: skip
        exec(code, names)
        assert torch.equal(mask, oracles.visible(plan, group=group, row_group=row_group)[0, 0])
        assert mask.any()


def test_layout_counts_blocks():
    assert layout().row_blocks == 2
    assert layout(rows=7, index=((0, 2), (1, 9))).row_blocks == 3
    assert layout(rows=6).row_blocks == 2
    assert layout().used().tolist() == [[[[True, True], [True, False]]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 5}, "5 queries in blocks of 2 are 3 query blocks, but index has 2"),
        ({"own": True}, r"own=True is for causal lists of single queries .*, got q_block=2, causal=False"),
        ({"q_block": 0}, "blocks must be at least 1, got q_block=0, k_block=3"),
        ({"k_block": -1}, "blocks must be at least 1, got q_block=2, k_block=-1"),
        ({"count": (1, 1, 1)}, r"count has shape \(1, 1, 3\), expected \(1, 1, 2\)"),
    ],
)
def test_layout_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        layout(**change)


def test_layout_is_immutable_and_moves_between_devices():
    plan = layout()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tokens = 3
    moved = plan.to("meta")
    assert moved.index.device.type == moved.count.device.type == "meta"
    assert (moved.tokens, moved.rows, moved.q_block) == (4, 5, 2)


def test_rows_have_the_length_of_their_keys():
    rows = Rows(normal(2, 3, 7, 4), normal(2, 3, 7, 5))
    assert len(rows) == 7
    assert rows.end is rows.bias is rows.group is None
    assert rows.offsets == ()


def test_partial_is_a_pair():
    partial = Partial(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2))
    assert partial.out.shape == (1, 1, 2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        partial.out = None


@dataclasses.dataclass(frozen=True)
class Inner:
    x: torch.Tensor
    n: int


@dataclasses.dataclass(frozen=True)
class Nested(State):
    k: torch.Tensor
    parts: tuple[Inner, ...]
    maybe: torch.Tensor | None = None


def nested():
    return Nested(5, torch.arange(6.0).view(3, 2), (Inner(torch.ones(3, 1), 7), Inner(torch.zeros(3, 4), 8)))


def test_state_walks_through_nested_dataclasses():
    state = nested()
    assert list(state.tensors()) == ["k", "parts.0.x", "parts.1.x"]
    assert state.nbytes == 4 * (6 + 3 + 12)
    other = state.replaced({name: x + 1 for name, x in state.tensors().items()})
    assert torch.equal(other.parts[1].x, torch.ones(3, 4))
    assert (other.tokens, other.parts[0].n, other.maybe) == (5, 7, None)
    assert torch.equal(state.parts[1].x, torch.zeros(3, 4))
    again = state.reorder(torch.tensor([2, 2]))
    assert again.k.tolist() == [[4, 5], [4, 5]]
    assert state.to(torch.float64).k.dtype == torch.float64
    copied = state.copy()
    copied.k.zero_()
    assert state.k.sum() == 15
    assert torch.equal(state.replaced({"parts.0.x": torch.full((3, 1), 9.0)}).k, state.k)
    with pytest.raises(ValueError, match=r"Nested: has no tensors \['v'\]; there are k, parts.0.x, parts.1.x"):
        state.replaced({"v": state.k})


def test_a_state_that_cannot_be_cropped_says_so():
    with pytest.raises(NotImplementedError, match="Nested: crop is not supported"):
        nested().crop(1)


def test_cases_have_readable_names():
    assert str(Case()) == "default"
    assert str(Case(options={"block": 4, "causal": False})) == "block=4-causal=False"


def test_defaults_of_what_a_mechanism_declares():
    assert Supports() == Supports(causal=True, noncausal=True, cross=False, packed=False, rotary=False)
    assert Paper("title", "authors", 2020).arxiv is None


def test_annotations_hold_at_run_time():
    """Every mechanism, summarize, select, attend and scan under jaxtyping and beartype, in a process of its own."""
    pytest.importorskip("beartype")
    tests = Path(__file__).parent
    wanted = "forward_float32 or packed_documents or state_is_immutable or postcard or any_pieces or everything_at_once"
    files = [str(tests / f"test_{name}.py") for name in ("contract", "summarize", "scan", "attend")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", wanted, *files],
        env=os.environ | {"FARFIELD_TYPECHECK": "1", "FARFIELD_EXAMPLES": "3"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
