"""Shared fixtures: small problems, float64, nothing from outside the repository."""

import importlib.util
import os

import numba
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from theory.problem import Regression, gaussian_sparse

# Test processes share the cores: one torch thread in each. Numba's pool, when it starts, sets OpenMP's threads and so
# torch's; asking for their number starts it.
numba.get_num_threads()
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` need a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def small() -> Regression:
    return gaussian_sparse(8, 12, 3, n_test=20)


@pytest.fixture
def triton_kernels() -> None:
    """Triton kernels run: on a CUDA device, or on the CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")


@pytest.fixture(autouse=True)
def _global_generators_untouched():
    """No code of ours may read or write the global generators: each test leaves them as it found them."""
    import numpy as np

    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
