"""The controls that have kernels, on a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from farfield.mechanisms.fma import FMA

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PATH = Path(__file__).parents[2] / "examples" / "controls" / "fma_opened.py"


@pytest.mark.parametrize("score", ["mean", "peak"])
def test_opened_fma_chooses_as_fma(score):
    spec = importlib.util.spec_from_file_location("_control_fma_opened", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    options = {"rank": 4, "near": 128, "open": 4, "beam": 16, "detail": 16, "score": score}
    q, k, v = (torch.randn(2, 4, 3000, 64, device="cuda").bfloat16() for _ in range(3))
    out = module.OpenedFMA(**options)(q, k, v).float()
    want = FMA(**options)(q.float(), k.float(), v.float())
    alike = (out - want).norm(dim=-1) < 0.02 * want.norm(dim=-1)
    # means that rounding tells apart differently are few
    assert alike.float().mean() > 0.95
    other = FMA(**options | {"score": {"mean": "peak", "peak": "mean"}[score]})(q.float(), k.float(), v.float())
    assert ((out - other).norm(dim=-1) < 0.02 * other.norm(dim=-1)).float().mean() < 0.5
