"""The normals of :mod:`theory.normals` in plain torch, on any device: the same integers, the same transform.

Integers are equal bit for bit; the normals differ by the rounding of the device's ln, sin and cos (a few 1e-16 of |z|).
On CUDA devices a Triton kernel makes the same numbers in one pass, where there is Triton.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from theory.device import has_triton
from theory.normals import BLOCK, LANES

_LOW = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_GRID = math.pi / 2 / 2**22  # of the angle within a quadrant


def philox(key: np.uint64, step: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words for each (counter, step), int64, of the two's broadcast shape."""
    x0, x1, x2, x3 = torch.broadcast_tensors(counter & _LOW, counter >> 32 & _LOW, step & _LOW, step >> 32 & _LOW)
    k0, k1 = int(key) & _LOW, int(key) >> 32
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1  # products wrap around; a shifted sign is masked away
        x0, x1, x2, x3 = (p1 >> 32 & _LOW) ^ x1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return x0, x1, x2, x3


def _box_muller(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A pair of normals from each 64 bits: the radius from the upper 40, the angle from the lower 24."""
    radius = (-2 * (((low >> 24 | high << 8).double() + 0.5) * 2.0**-40).log()).sqrt()
    angle = ((low & 0x3FFFFF).double() - (2.0**21 - 0.5)) * _GRID
    quadrant = low >> 22 & 3
    sine, cosine = angle.sin(), torch.where(quadrant >= 2, -angle.cos(), angle.cos())
    swap = quadrant & 1 == 1
    return radius * torch.where(swap, sine, cosine), radius * torch.where(swap, cosine, sine)


def normal_rows(key: np.uint64, first_step: int, steps: int, numbers: int, device: torch.device | str) -> Tensor:
    """Normals 0 … ``numbers`` - 1 of the rows ``first_step`` …, shape (steps, numbers), float64."""
    device, blocks = torch.device(device), -(-numbers // BLOCK)
    if has_triton(device):
        from simulators.normals_triton import fill_rows

        return fill_rows(key, first_step, torch.empty(steps, numbers, dtype=torch.float64, device=device))
    step = torch.arange(first_step, first_step + steps, device=device).view(-1, 1, 1)
    counter = torch.arange(blocks * LANES, device=device).view(blocks, LANES)
    x0, x1, x2, x3 = philox(key, step, counter)
    quarters = torch.stack([*_box_muller(x0, x1), *_box_muller(x2, x3)], 2)
    return quarters.flatten(1)[:, :numbers].contiguous()
