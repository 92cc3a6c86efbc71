"""One thread, fixed seeds, and hypothesis without clocks. FARFIELD_TYPECHECK=1 checks every annotation at run time."""

import os

if os.environ.get("FARFIELD_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    # before anything of farfield is imported
    install_import_hook("farfield", "beartype.beartype")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "farfield",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("FARFIELD_EXAMPLES", "30")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("farfield")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
