"""One thread, fixed seeds, and hypothesis without clocks. FARFIELD_TYPECHECK=1 checks every annotation at run time."""

import os

TYPECHECK = os.environ.get("FARFIELD_TYPECHECK") == "1"
if TYPECHECK:
    from jaxtyping import install_import_hook

    # before anything of farfield is imported
    install_import_hook("farfield", "typechecker.checked")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

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


def pytest_collection_modifyitems(config, items):
    """Test processes that share the work begin with the longest tests, so that no one ends alone with them.

    With the type checker on, wrong arguments raise its errors, and tracers do not see through its wrappers.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name != "test_kernels.py")
    if TYPECHECK:
        skip = pytest.mark.skip(reason="FARFIELD_TYPECHECK=1")
        for item in items:
            if any(word in item.name for word in ("refus", "compiles", "traces", "flex", "block_mask", "opcheck")):
                item.add_marker(skip)
