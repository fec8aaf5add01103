"""What is drawn on a device is what the CPU draws: integers to the bit, normals to rounding.

Triton kernels run compiled on a CUDA device where there is one, and in Triton's interpreter elsewhere.
"""

import numpy as np
import pytest
import torch

from nets.sampling import BatchStream
from simulators.noise import BrownianIncrements
from simulators.normals_torch import normal_rows, philox
from theory.minibatch import Minibatch
from theory.normals import LANES, fill_rows, normals_key
from theory.normals import philox as philox_on_cpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = 4e-15  # of numbers up to 7.6 whose logarithm, sine and cosine are rounded elsewhere


def on_cpu(key, first_step, steps, numbers):
    rows = np.empty((steps, numbers))
    fill_rows(key, first_step, rows)
    return rows


@pytest.mark.parametrize("step", [0, 17, 2**33 + 5, 2**63 - 1])
def test_the_integers_in_torch_are_the_cpus(step):
    for stream in range(4):
        key = normals_key(stream, "integers")
        for first in (0, 2**32 - 10, 2**40 + 64):
            one, two = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
            philox_on_cpu(key, np.uint64(step), np.uint64(first), one, two)
            counter = torch.arange(first, first + LANES, device=DEVICE)
            words = [x.cpu().numpy().astype(np.uint64) for x in philox(key, torch.tensor(step, device=DEVICE), counter)]
            assert (words[0] | words[1] << np.uint64(32) == one).all()
            assert (words[2] | words[3] << np.uint64(32) == two).all()


@pytest.mark.parametrize("numbers", [1, 255, 1000, 4096])
def test_normals_in_torch_are_the_cpus(numbers, monkeypatch):
    monkeypatch.setattr("simulators.normals_torch.has_triton", lambda device: False)
    key = normals_key(3, "torch")
    rows = normal_rows(key, 2**33, 3, numbers, DEVICE)
    assert rows.shape == (3, numbers)
    assert np.abs(rows.cpu().numpy() - on_cpu(key, 2**33, 3, numbers)).max() < ROUNDING


@pytest.mark.parametrize(("numbers", "step"), [(1, 0), (300, 1), (1024, 2**33)])
def test_normals_in_a_kernel_are_the_cpus(triton_kernels, numbers, step):
    from simulators.normals_triton import fill_rows as fill_on_device

    key = normals_key(4, "kernel")
    rows = fill_on_device(key, step, torch.empty(3, numbers, dtype=torch.float64, device=DEVICE))
    assert np.abs(rows.cpu().numpy() - on_cpu(key, step, 3, numbers)).max() < ROUNDING


@pytest.mark.parametrize(
    ("n", "size"), [(1, 1), (8, 1), (80, 3), (1_500_000_000, 1), (2**31 - 1, 2)],
    ids=["one sample", "no rejection", "rare", "every third", "close to the range"],
)  # fmt: skip
def test_minibatches_drawn_by_a_kernel_are_numpys(triton_kernels, n, size):
    from nets.sampling_triton import DeviceBatchStream

    host = BatchStream(n, Minibatch(size), [3, 0, 11], 7)
    drawn = DeviceBatchStream(n, size, [3, 0, 11], 7, DEVICE)
    for steps in (5, 1, 0, 300, 8):
        assert np.array_equal(drawn.block(steps).cpu().numpy(), host.block(steps))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("refine", [1, 4])
def test_increments_on_a_gpu_are_the_cpus(refine):
    host, device = (BrownianIncrements(3, "w", 70, 11, refine=refine, device=where) for where in ("cpu", DEVICE))
    for step in (0, 5, 10_000):
        assert (device(step).cpu() - host(step)).abs().max() < ROUNDING * refine**0.5
