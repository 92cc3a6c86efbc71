"""assert_within accepts a correct result in every dtype and rejects the mistakes that kernels make."""

import pytest
import torch

from farfield.testing.inputs import normal
from farfield.testing.units import assert_within, error_units

T, D = 256, 32
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def softmax(q, k, v, scale=D**-0.5):
    """Attention as a kernel does it: products of the inputs' dtype, sums in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = (q.to(wide) @ k.to(wide).mT * scale).softmax(-1)
    return (weights.to(v.dtype).to(wide) @ v.to(wide)).to(q.dtype)


@pytest.fixture
def qkv():
    return [normal(2, T, D, seed=s) for s in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_a_correct_result(qkv, dtype):
    assert_within(softmax(*(x.to(dtype) for x in qkv)), softmax(*qkv), terms=T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_scale_one_percent_off_a_lost_key_and_a_shift(qkv, dtype):
    q, k, v = qkv
    exact = softmax(q, k, v)
    q, k, v = (x.to(dtype) for x in qkv)
    for wrong in (
        softmax(q, k, v, scale=1.1 * D**-0.5),
        softmax(q, k, v) * 1.02,
        softmax(q, k[:, :-4], v[:, :-4]),
        softmax(q, k, v).roll(1, 1),
        softmax(q, k, v) + 0.05,
    ):
        with pytest.raises(AssertionError, match="units"):
            assert_within(wrong, exact, terms=T)


def test_rejects_one_bad_row_among_many_in_float32():
    exact = normal(4, 1000, 8)
    got = exact.float()
    assert_within(got, exact, terms=1)
    got[2, 77] *= 1 + 1e-5
    with pytest.raises(AssertionError, match=r"row \(2, 77\) is off by"):
        assert_within(got, exact, terms=1)


def test_a_large_row_counts_by_its_own_size():
    exact = normal(100, 8)
    exact[3] *= 1e4
    got = exact.float() * (1 + 3e-7)
    assert_within(got, exact, terms=100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rejects_what_is_not_finite(bad):
    exact = normal(10, 3)
    got = exact.clone()
    got[1, 1] = bad
    with pytest.raises(AssertionError, match=r"NaN|finite"):
        assert_within(got, exact, terms=1)


def test_infinities_must_stand_where_the_reference_has_them():
    exact = normal(10)
    exact[3] = float("-inf")
    assert_within(exact.float(), exact, terms=1)
    for other in (0.0, float("inf")):
        got = exact.float()
        got[3] = other
        with pytest.raises(AssertionError, match="infinities"):
            assert_within(got, exact, terms=1)


def test_zeros_must_be_zeros():
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    assert_within(zeros.float(), zeros, terms=5)
    with pytest.raises(AssertionError, match="error is inf units"):
        assert_within(zeros.float() + 1e-30, zeros, terms=5)


def test_refuses_other_shapes_and_references_that_are_not_float64():
    x = normal(3, 4)
    with pytest.raises(AssertionError, match=r"shape \(3, 4\), expected \(4, 3\)"):
        assert_within(x, x.mT, terms=1)
    with pytest.raises(TypeError, match=r"must be float64, got torch\.float32"):
        assert_within(x, x.float(), terms=1)
    with pytest.raises(TypeError, match="floating point"):
        assert_within(x.long(), x, terms=1)


def test_empty_and_single_numbers():
    assert_within(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64), terms=1)
    assert_within(torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), terms=1)


def test_error_units_of_exact_rounding_is_at_most_one():
    exact = normal(1000) / 3
    assert 0.5 < error_units(exact.bfloat16(), exact, terms=1) <= 1


def test_normal_numbers_survive_every_dtype():
    x = normal(1000, seed=5)
    assert x.dtype == torch.float64
    assert torch.equal(x.bfloat16().double(), x)
    assert not torch.equal(x, normal(1000, seed=6))
