"""The quartic well in the Triton kernel: compiled on a CUDA device, else in Triton's interpreter."""

import numpy as np
import pytest
import torch

from simulators.scalar import quartic_well

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("scheme", ["euler", "split"])
def test_well_in_the_kernel_is_the_compiled_loop(triton_kernels, monkeypatch, scheme):
    start = np.concatenate([np.linspace(-2, 2, 258), [1e-144, -1e-146]])
    found = []
    for on in (False, True):
        monkeypatch.setattr("simulators.scalar.has_triton", lambda device, on=on: on)
        found.append(quartic_well(1.5, [0.0, 2.5], start, 0.0025, [0, 1, 5], 3, "well", scheme, device=DEVICE))
    assert found[0].shape == (3, 2, 260)
    assert np.allclose(found[1], found[0], rtol=1e-13, atol=0)
    assert np.array_equal(found[1][0], np.broadcast_to(start, (2, 260))) or scheme == "split"
    assert not np.allclose(found[1][2, 1], found[1][2, 0], rtol=1e-2)  # there is noise
