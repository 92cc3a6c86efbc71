"""The contract on a GPU: every mechanism, case and check, and compiled by Inductor's GPU back-end."""

import pytest
import torch

from farfield.testing import contract, inputs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

COMPILED = (contract.check_compiles,)
PAIRS = [
    pytest.param(check, name, case, id=f"{check.__name__.removeprefix('check_')}-{name}-{case}")
    for name, case in contract.cases()
    for check in contract.CHECKS
    if check not in COMPILED and contract.why_not(check, name, case) is None
]
# the code generator takes a while: one case of each mechanism
FIRST = [pytest.param(name, contract.mechanisms.get(name).cases[0], id=name) for name in contract.mechanisms.names()]


@pytest.fixture(autouse=True)
def _on_cuda():
    with inputs.on("cuda"):
        yield


@pytest.mark.parametrize(("check", "name", "case"), PAIRS)
def test_contract(check, name, case):
    check(name, case)


@pytest.mark.parametrize(("name", "case"), FIRST)
def test_compiles(name, case):
    contract.check_compiles(name, case)


def test_inputs_are_those_of_the_cpu():
    for here, there in zip(inputs.draw(contract.Case()), _on_the_cpu(contract.Case()), strict=True):
        assert here.is_cuda
        assert torch.equal(here.cpu(), there)


def _on_the_cpu(case):
    with inputs.on("cpu"):
        return inputs.draw(case)
