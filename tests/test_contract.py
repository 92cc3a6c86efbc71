"""The contract, for every registered mechanism and each of its cases. Left out is only what a mechanism declares."""

import pytest

from farfield.testing import contract, inputs

COMPILED = 1  # cases of each mechanism that go through the code generator, forward and backward


PAIRS = [
    pytest.param(check, name, case, id=f"{check.__name__.removeprefix('check_')}-{name}-{case}")
    for name, case in contract.cases()
    for check in contract.CHECKS
    if check is not contract.check_compiles and contract.why_not(check, name, case) is None
]


@pytest.mark.parametrize(("check", "name", "case"), PAIRS)
def test_contract(check, name, case):
    check(name, case)


@pytest.mark.parametrize(("name", "case"), contract.cases(), ids=lambda x: str(x))
def test_traces(name, case):
    contract.check_traces(name, case)


FIRST = [(name, case) for name, case in contract.cases() if case in contract.mechanisms.get(name).cases[:COMPILED]]


@pytest.mark.parametrize(("name", "case"), FIRST, ids=lambda x: str(x))
def test_compiles(name, case):
    contract.check_compiles(name, case)


def test_inputs_follow_the_device():
    with inputs.on("meta"):
        assert inputs.draw(contract.Case())[0].is_meta
    assert inputs.device().type == "cpu"
