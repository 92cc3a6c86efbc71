"""How near is near enough: errors in units of what the dtype and the length of the sums allow."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within(got: Tensor, exact: Tensor, *, terms: int, units: float = 3.0, name: str = "out") -> None:
    """`got` is as near `exact` as its dtype allows, up to a factor `units`.

    One unit is the rms error of rounding `exact` to got's dtype, plus that of adding up `terms` numbers in the
    accumulating dtype (float32, or float64 if got is float64). It follows the dtype and the problem size, so tests
    carry no tolerances. In float32 no row (last dimension) may be off by more than ten units either, where a row
    larger than the average one counts by its own size. Infinities must stand where they stand in `exact`.

    Args:
        got: result under test, any floating dtype.
        exact: the reference, computed in float64.
        terms: length of the longest sum behind one element, usually the number of keys.
        units: allowed rms error, in units. Rows are allowed 10 / 3 of it.
        name: what the message calls the result.

    Raises:
        AssertionError: the error is larger, or shapes or infinities differ, or there is a NaN.
        TypeError: `exact` is not float64.
    """
    if exact.dtype != torch.float64:
        raise TypeError(f"assert_within: the reference for {name} must be float64, got {exact.dtype}")
    if not got.is_floating_point():
        raise TypeError(f"assert_within: {name} must be floating point, got {got.dtype}")
    got, exact = got.detach(), exact.detach()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} of {got.numel()} values are NaN"
    assert torch.equal(got.double()[~finite], exact[~finite]), f"{name}: infinities differ from the reference"
    assert got[finite].isfinite().all(), f"{name}: {int((~got[finite].isfinite()).sum())} values are not finite"

    size = _rms(exact[finite])
    summing = max(terms, 1) ** 0.5 * torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps * size
    unit = _rms((exact.to(got.dtype).double() - exact)[finite]) + summing
    error = (got.double() - exact).where(finite, 0.0)
    total = _rms(error[finite])
    assert total <= units * unit, (
        f"{name}: error is {_ratio(total, unit):.1f} units, {units:g} allowed "
        f"({_ratio(total, size):.1e} of the rms value, {got.dtype})"
    )
    if got.dtype == torch.float32 and got.dim() and got.numel():
        rows = error.square().mean(-1).sqrt()
        sizes = exact.where(finite, 0.0).square().mean(-1).sqrt()
        allowed = 10 / 3 * units * unit * (sizes / size).clamp(min=1.0) if size else torch.zeros_like(sizes)
        bad = rows > allowed
        worst = int((rows - allowed).argmax())
        assert not bad.any(), (
            f"{name}: row {_place(worst, rows.shape)} is off by "
            f"{_ratio(10 / 3 * units * rows.flatten()[worst], allowed.flatten()[worst]):.1f} units, "
            f"{10 / 3 * units:.3g} allowed; "
            f"{int(bad.sum())} of {rows.numel()} rows are off by more"
        )


def error_units(got: Tensor, exact: Tensor, *, terms: int) -> float:
    """The rms error of `got` in the units of assert_within."""
    exact = exact.detach()
    summing = max(terms, 1) ** 0.5 * torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps * _rms(exact)
    unit = _rms(exact.to(got.dtype).double() - exact) + summing
    return _ratio(_rms(got.detach().double() - exact), unit)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _ratio(a: float | Tensor, b: float | Tensor) -> float:
    a, b = float(a), float(b)
    return a / b if b else (0.0 if a == 0 else float("inf"))


def _place(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))
