"""What all tests share: shapes checked at run time, Hypothesis profiles, and where the shipped checkpoint lies."""

import os
import sys

import pytest
from hypothesis import HealthCheck, Phase, settings
from jaxtyping import install_import_hook

collect_ignore = ["compiled", "kernels", "browser"]  # which `test_compiled.py`, `test_kernels.py`, `test_demo.py` run

# several processes, `-n 2`: their threads would wait for one another
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# every jaxtyping signature of the package is checked while the tests run
# mutmut loads this file again in each of its children, where the hook has come first already
assert "pgfunc" not in sys.modules or "MUTANT_UNDER_TEST" in os.environ, "the import hook must come first"
install_import_hook("pgfunc", "beartype.beartype")

import torch  # noqa: E402

import pgfunc as pg  # noqa: E402

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=10, deadline=None, suppress_health_check=slow)
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True, suppress_health_check=slow)
settings.register_profile("deep", max_examples=400, deadline=None, suppress_health_check=slow)
# for mutation testing: the same examples each time, and that a test fails is enough
phases = [Phase.explicit, Phase.generate]
settings.register_profile("mutants", settings.get_profile("dev"), derandomize=True, phases=phases)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shipped() -> pg.Model:
    """The shipped checkpoint, on the CPU in float32."""
    return pg.load(dtype="float32", device="cpu")
