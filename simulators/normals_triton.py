"""The normals of :mod:`theory.normals` inside Triton kernels. Import it only where there is Triton.

The transform is the CPU's, operation by operation, so that what differs is the contraction of products and sums.
A Python float on its own is float32 to Triton: constants stand beside float64 tensors, parameters come in tensors.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from theory.normals import BLOCK, LANES

GROUP = tl.constexpr(LANES)
WHOLE = tl.constexpr(BLOCK)
_LN2 = tl.constexpr(math.log(2.0))
_GRID = tl.constexpr(math.pi / 2 / 2**22)


def signed(key: np.uint64) -> int:
    """The key's 64 bits as the signed integer in which kernels take it."""
    return int(np.uint64(key).astype(np.int64))


@triton.jit
def _words(key, step, counter):  # type: ignore[no-untyped-def]
    """128 bits as two 64-bit words for each counter."""
    zero = counter * 0  # int64, and with it the step
    x0, x1, x2, x3 = tl.philox(
        key,
        counter.to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + (step >> 32)).to(tl.uint32),
    )
    return x0.to(tl.uint64) | (x1.to(tl.uint64) << 32), x2.to(tl.uint64) | (x3.to(tl.uint64) << 32)


@triton.jit
def _radius(word):  # type: ignore[no-untyped-def]
    """√(-2 ln u) with u = (k + 1/2) 2^-40 from the upper 40 bits."""
    u = (word >> 24).to(tl.int64).to(tl.float64) + 0.5
    bits = u.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52  # u = m 2^e with m in [√½, √2)
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = z * (1 / 21) + 1 / 19  # ln m = 2 artanh s
    p = p * z + 1 / 17
    p = p * z + 1 / 15
    p = p * z + 1 / 13
    p = p * z + 1 / 11
    p = p * z + 1 / 9
    p = p * z + 1 / 7
    p = p * z + 1 / 5
    p = p * z + 1 / 3
    log = (exponent - 40).to(tl.float64) * _LN2 + 2.0 * s + 2.0 * s * z * p
    return tl.sqrt(-2.0 * log)


@triton.jit
def _sine_cosine(word):  # type: ignore[no-untyped-def]
    """Sine and cosine of the angle within its quadrant, the cosine with the quadrant's sign, and whether to swap."""
    x = ((word & 0x3FFFFF).to(tl.int64).to(tl.float64) - 2097151.5) * _GRID
    y = x * x
    q = y * (-1 / 1307674368000) + 1 / 6227020800
    q = q * y - 1 / 39916800
    q = q * y + 1 / 362880
    q = q * y - 1 / 5040
    q = q * y + 1 / 120
    q = q * y - 1 / 6
    sine = x + x * y * q
    q = y * (1 / 20922789888000) - 1 / 87178291200
    q = q * y + 1 / 479001600
    q = q * y - 1 / 3628800
    q = q * y + 1 / 40320
    q = q * y - 1 / 720
    q = q * y + 1 / 24
    q = q * y - 1 / 2
    cosine = q * y + 1.0
    quadrant = (word >> 22) & 3
    return sine, tl.where(quadrant >= 2, -cosine, cosine), (quadrant & 1) == 1


@triton.jit
def normal_quarters(key, step, block, lane):  # type: ignore[no-untyped-def]
    """The four quarters of the block of 256 normals: numbers lane, 64 + lane, 128 + lane, 192 + lane."""
    one, two = _words(key, step, block * GROUP + lane)
    radius = _radius(one)
    sine, cosine, swap = _sine_cosine(one)
    a, b = radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)
    radius = _radius(two)
    sine, cosine, swap = _sine_cosine(two)
    return a, b, radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def normals_at(key, step, number):  # type: ignore[no-untyped-def]
    """Normals by their numbers (int64, any shape): three quarters of what the counters give is thrown away."""
    within = number % WHOLE
    one, two = _words(key, step, number // WHOLE * GROUP + within % GROUP)
    word = tl.where(within < 2 * GROUP, one, two)
    sine, cosine, swap = _sine_cosine(word)
    first = (within // GROUP) % 2 == 0
    return _radius(word) * tl.where(swap == first, sine, cosine)


@triton.jit(do_not_specialize=["key", "first_step"])
def _fill(out, key, first_step, numbers, blocks):  # type: ignore[no-untyped-def]
    row, block, lane = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.arange(0, GROUP)
    begin = block.to(tl.int64) * WHOLE
    a, b, c, d = normal_quarters(key, first_step.to(tl.int64) + row, block.to(tl.int64), lane.to(tl.int64))
    at, here = begin + lane, out + row.to(tl.int64) * numbers
    tl.store(here + at, a, mask=at < numbers)
    tl.store(here + at + GROUP, b, mask=at + GROUP < numbers)
    tl.store(here + at + 2 * GROUP, c, mask=at + 2 * GROUP < numbers)
    tl.store(here + at + 3 * GROUP, d, mask=at + 3 * GROUP < numbers)


def fill_rows(key: np.uint64, first_step: int, out: Tensor) -> Tensor:
    """Rows ``first_step`` … from number 0 on into the contiguous float64 ``out`` of shape (steps, numbers)."""
    steps, numbers = out.shape
    blocks = -(-numbers // BLOCK)
    with torch.cuda.device_of(out):
        _fill[(steps * blocks,)](out, signed(key), first_step, numbers, blocks, num_warps=2, enable_fp_fusion=True)
    return out
