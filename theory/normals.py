"""Standard normals from a counter, in compiled loops: number i of row ``step`` is a function of (key, step, i) alone.

Philox4x32-10 turns (i, step) into 128 random bits, Box-Muller turns these into four normals: a radius from 40 bits
(|z| < 7.6) and an angle from 24 for each pair. There is no state, so any part of any row can be drawn in any order, by
any thread, and the loops hold no branch and no call, so that they vectorise.

Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller (1958).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from theory.streams import seed_of

LANES = 64
BLOCK = 4 * LANES  # normals made together
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_SQRT_HALF = np.int64(0x3FE6A09E667F3BCD)  # its bit pattern
_LN2 = np.log(2.0)
_GRID = np.pi / 2 / 2**22  # of the angle within a quadrant


def normals_key(seed: int, stream: str) -> np.uint64:
    """The key of a named stream."""
    return np.uint64(seed_of(seed, stream) >> 64)


@njit(cache=True, inline="always")
def philox(key, step, first, one, two):  # type: ignore[no-untyped-def]
    """128 bits for the counters (first + lane, step): ``one`` and ``two`` receive 64 each, for ``LANES`` lanes."""
    step_low, step_high = step & _LOW, step >> _32
    for lane in range(LANES):
        counter = first + np.uint64(lane)
        x0, x1, x2, x3 = counter & _LOW, counter >> _32, step_low, step_high
        k0, k1 = key & _LOW, key >> _32
        for _ in range(10):
            p0, p1 = x0 * _M0, x2 * _M1
            x0, x1, x2, x3 = (p1 >> _32) ^ x1 ^ k0, p1 & _LOW, (p0 >> _32) ^ x3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        one[lane] = x0 | (x1 << _32)
        two[lane] = x2 | (x3 << _32)


@njit(cache=True, inline="always", error_model="numpy")
def _box_muller(bits, work, first, second):  # type: ignore[no-untyped-def]
    """A pair of normals from 64 bits, for ``LANES`` lanes; ``bits`` and ``work`` are overwritten."""
    words, floats = work.view(np.int64), bits.view(np.float64)
    integers = bits.view(np.int64)
    for lane in range(LANES):  # u = (k + 1/2) 2^-40, and the angle's 24 bits kept aside
        word = bits[lane]
        first[lane] = np.float64(np.int64(word & np.uint64(0x3FFFFF))) - (2097152.0 - 0.5)
        second[lane] = np.float64(np.int64((word >> np.uint64(22)) & np.uint64(3)))
        work[lane] = np.float64(np.int64(word >> np.uint64(24))) + 0.5
    for lane in range(LANES):  # u = m 2^e with m in [√½, √2)
        exponent = (words[lane] - _SQRT_HALF) >> 52
        integers[lane] = words[lane] - (exponent << 52)
        work[lane] = np.float64(exponent - 40)
    for lane in range(LANES):
        m = floats[lane]
        s = (m - 1.0) / (m + 1.0)
        z = s * s
        p = 1 / 21  # ln m = 2 artanh s
        p = p * z + 1 / 19
        p = p * z + 1 / 17
        p = p * z + 1 / 15
        p = p * z + 1 / 13
        p = p * z + 1 / 11
        p = p * z + 1 / 9
        p = p * z + 1 / 7
        p = p * z + 1 / 5
        p = p * z + 1 / 3
        log = work[lane] * _LN2 + 2.0 * s + 2.0 * s * z * p
        radius = np.sqrt(-2.0 * log)
        x = first[lane] * _GRID  # the angle, in (-π/4, π/4)
        y = x * x
        q = -1 / 1307674368000  # 1/15!
        q = q * y + 1 / 6227020800
        q = q * y - 1 / 39916800
        q = q * y + 1 / 362880
        q = q * y - 1 / 5040
        q = q * y + 1 / 120
        q = q * y - 1 / 6
        sine = x + x * y * q
        q = 1 / 20922789888000  # 1/16!
        q = q * y - 1 / 87178291200
        q = q * y + 1 / 479001600
        q = q * y - 1 / 3628800
        q = q * y + 1 / 40320
        q = q * y - 1 / 720
        q = q * y + 1 / 24
        q = q * y - 1 / 2
        quadrant = second[lane]
        cosine = (1.0 + q * y) * (1.0 - 2.0 * (quadrant >= 2.0))
        swap = quadrant == 1.0 or quadrant == 3.0
        first[lane] = radius * (sine if swap else cosine)
        second[lane] = radius * (cosine if swap else sine)


@njit(cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def fill_block(key, step, block, out, bits, work):  # type: ignore[no-untyped-def]
    """Normals ``block·BLOCK`` … of a row to ``out`` (BLOCK,); ``bits`` (2, LANES) and ``work`` (LANES,) are scratch."""
    philox(key, step, np.uint64(block) * np.uint64(LANES), bits[0], bits[1])
    _box_muller(bits[0], work, out[:LANES], out[LANES : 2 * LANES])
    _box_muller(bits[1], work, out[2 * LANES : 3 * LANES], out[3 * LANES :])


@njit(cache=True, nogil=True)
def fill_row(key, step, first, out):  # type: ignore[no-untyped-def]
    """Standard normals ``first`` … ``first + len(out) - 1`` of row ``step`` into the contiguous float64 ``out``.

    A block of 256 is always made whole, so start and length cost least at multiples of 256, and change no number.
    """
    step = np.uint64(step)
    bits, work, spare = np.empty((2, LANES), np.uint64), np.empty(LANES), np.empty(BLOCK)
    done = 0
    while done < len(out):
        block, offset = divmod(first + done, BLOCK)
        count = min(BLOCK - offset, len(out) - done)
        if count == BLOCK:
            fill_block(key, step, block, out[done : done + BLOCK], bits, work)
        else:
            fill_block(key, step, block, spare, bits, work)
            out[done : done + count] = spare[offset : offset + count]
        done += count


@njit(cache=True, nogil=True, parallel=True)
def fill_rows(key, first_step, out):  # type: ignore[no-untyped-def]
    """Rows ``first_step`` … from number 0 on, ``out`` of shape (steps, numbers), spread over threads."""
    steps, numbers = out.shape
    parts = -(-numbers // (16 * BLOCK))
    for part in prange(steps * parts):
        row, begin = part // parts, part % parts * 16 * BLOCK
        fill_row(key, first_step + row, begin, out[row, begin : begin + 16 * BLOCK])
