"""Minibatch indices drawn on the GPU: number by number those of :class:`nets.sampling.BatchStream`.

numpy's Philox4x64-10 is counter-based, and its ``integers`` (Lemire's method) takes one 32-bit word w a number: n·w has
the number in its upper half, and is rejected when its lower half is below 2³² mod n. So words are made at once, and the
rejected ones, about n in 2³², are closed up afterwards. Import it only where there is Triton.

Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3"; Lemire (2019), "Fast random integer
generation in an interval".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from theory.streams import stream_key

_COUNTERS = tl.constexpr(128)  # of eight words each, a program
SPARE = 64  # words beyond twice the expected rejections: that more are rejected has probability below 1e-80


class DeviceBatchStream:
    """Indices of the samples of each minibatch, drawn with replacement, for several seeds, on a device."""

    def __init__(self, n: int, size: int, seeds: Sequence[int], root_seed: int, device: torch.device) -> None:
        keys = np.stack([stream_key(root_seed, "batches", seed) for seed in seeds])
        self._n, self._size, self._seeds = n, size, len(seeds)
        self._keys = torch.from_numpy(keys.view(np.int64)).to(device)
        self._taken = torch.zeros(self._seeds, dtype=torch.int64, device=device)  # words

    def block(self, steps: int) -> Tensor:
        """The next ``steps`` minibatches, shape (seeds, steps, B), int32, on the device."""
        wanted, shape = steps * self._size, (self._seeds, steps, self._size)
        if self._n == 1 or wanted == 0:  # nothing to draw, and numpy takes no word
            return torch.zeros(shape, dtype=torch.int32, device=self._keys.device)
        words = wanted + SPARE + int(2 * wanted * (2**32 % self._n) / 2**32)
        drawn = torch.empty(self._seeds, words, dtype=torch.int32, device=self._keys.device)
        parts = triton.cdiv(words + 7, 8 * _COUNTERS.value)  # the first word may be any of a counter's eight
        with torch.cuda.device_of(drawn):
            _draw[(self._seeds, parts)](
                drawn, self._keys, self._taken, self._n, 2**32 % self._n, words, enable_fp_fusion=True
            )
        rank = (drawn >= 0).cumsum(1)  # of a number among those kept, from 1
        self._taken += (rank < wanted).sum(1) + 1
        # What is rejected or left over goes to one last column: no count has to reach the host.
        place = torch.where((drawn >= 0) & (rank <= wanted), rank - 1, wanted)
        out = drawn.new_empty(self._seeds, wanted + 1).scatter_(1, place, drawn)
        return out[:, :wanted].unflatten(1, shape[1:])


@triton.jit(do_not_specialize=["n", "threshold", "words"])
def _draw(out, keys, taken, n, threshold, words):  # type: ignore[no-untyped-def]
    """The number of every word from the first not taken on, -1 where it is rejected."""
    seed, part = tl.program_id(0), tl.program_id(1)
    first = tl.load(taken + seed)
    counter = first // 8 + part * _COUNTERS + tl.arange(0, _COUNTERS)
    c0 = (counter + 1).to(tl.uint64)  # numpy counts up before it draws
    zero = c0 * 0
    k0, k1 = tl.load(keys + 2 * seed).to(tl.uint64), tl.load(keys + 2 * seed + 1).to(tl.uint64)
    x0, x1, x2, x3 = tl.philox_impl(c0, zero, zero, zero, k0, k1, 10)
    here, at = out + seed.to(tl.int64) * words, counter * 8 - first
    _store(here, at, x0, n, threshold, words)
    _store(here, at + 2, x1, n, threshold, words)
    _store(here, at + 4, x2, n, threshold, words)
    _store(here, at + 6, x3, n, threshold, words)


@triton.jit
def _store(here, at, word, n, threshold, words):  # type: ignore[no-untyped-def]
    """Two numbers, of the lower and then the upper 32 bits of a word."""
    low = (word & 0xFFFFFFFF) * n.to(tl.uint64)
    high = (word >> 32) * n.to(tl.uint64)
    first = tl.where((low & 0xFFFFFFFF) < threshold.to(tl.uint64), -1, (low >> 32).to(tl.int32))
    second = tl.where((high & 0xFFFFFFFF) < threshold.to(tl.uint64), -1, (high >> 32).to(tl.int32))
    tl.store(here + at, first, mask=(at >= 0) & (at < words))
    tl.store(here + at + 1, second, mask=(at + 1 >= 0) & (at + 1 < words))
