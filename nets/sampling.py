"""What a run draws: minibatch indices and label perturbations per seed, from named streams.

A seed's draws depend on (root seed, seed) alone: not on how many seeds run, nor on how the run is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from theory.minibatch import Minibatch
from theory.streams import named_generator

if TYPE_CHECKING:
    from nets.sampling_triton import DeviceBatchStream


class BatchStream:
    """Indices of the samples of each minibatch, for several seeds."""

    def __init__(self, n: int, batch: Minibatch, seeds: Sequence[int], root_seed: int) -> None:
        batch.variance_factor(n)  # says so when the batch cannot be drawn
        self._n, self._batch = n, batch
        self._generators = [named_generator(root_seed, "batches", seed) for seed in seeds]

    def block(self, steps: int) -> np.ndarray:
        """The next ``steps`` minibatches, shape (seeds, steps, B), int32."""
        size = self._batch.size
        if self._batch.replacement or size == 1:
            draws = [g.integers(0, self._n, (steps, size), dtype=np.int32) for g in self._generators]
        else:
            draws = [np.argsort(g.random((steps, self._n)), 1)[:, :size].astype(np.int32) for g in self._generators]
        return np.stack(draws)


def batch_stream(
    n: int, batch: Minibatch, seeds: Sequence[int], root_seed: int, device: torch.device | None
) -> BatchStream | DeviceBatchStream:
    """The stream of minibatches, drawn on the device where that can be."""
    if device is None or not (batch.replacement or batch.size == 1):
        return BatchStream(n, batch, seeds, root_seed)
    from nets.sampling_triton import DeviceBatchStream

    return DeviceBatchStream(n, batch.size, seeds, root_seed, device)


class LabelNoiseStream:
    """Standard normal label perturbations, fresh for every sample drawn, for several seeds."""

    def __init__(self, size: int, seeds: Sequence[int], root_seed: int) -> None:
        self._size = size
        self._generators = [named_generator(root_seed, "label noise", seed) for seed in seeds]

    def block(self, steps: int) -> np.ndarray:
        """The next ``steps`` perturbations, shape (seeds, steps, B)."""
        return np.stack([g.standard_normal((steps, self._size)) for g in self._generators])


class Draws:
    """Everything a run draws, block by block: given or random minibatches (or all samples), and label perturbations.

    Args:
        n: number of samples.
        batch: minibatch size and sampling; without replacement and of size n it is the full batch.
        label_noise: standard deviation of the label perturbations.
        indices: samples to visit instead of random ones, shape (seeds, steps) or (seeds, steps, B).
        device: draw minibatches there, the same numbers, where Triton can (with replacement, or of one sample).

    Raises:
        ValueError: indices that do not fit or that number no sample, a batch that cannot be drawn.
    """

    def __init__(
        self, n: int, batch: Minibatch, seeds: Sequence[int], steps: int, root_seed: int, label_noise: float,
        indices: np.ndarray | None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self._n, self._seeds, self._label_noise = n, len(seeds), label_noise
        self._given = None if indices is None else _checked(indices, n, len(seeds), steps)
        self.size = batch.size if self._given is None else self._given.shape[2]
        self.full_batch = self._given is None and not batch.replacement and self.size == n
        random = self._given is None and not self.full_batch
        self._stream = batch_stream(n, batch, seeds, root_seed, device) if random else None
        self._noise = LabelNoiseStream(self.size, seeds, root_seed) if label_noise else None

    def block(self, begin: int, length: int) -> tuple[Any, np.ndarray]:
        """Indices (seeds, length, B), int32, and label shifts of the same shape, or of shape (0, 0, 0) for none.

        Blocks have to be asked in order. Indices drawn on a device are a tensor there, all others an array.
        """
        index: Any
        if self._given is not None:
            index = self._given[:, begin : begin + length]
        elif self._stream is not None:
            index = self._stream.block(length)
        else:
            index = np.broadcast_to(np.arange(self._n, dtype=np.int32), (self._seeds, length, self._n))
        shift = self._label_noise * self._noise.block(length) if self._noise else np.empty((0, 0, 0))
        return index, shift


def _checked(indices: np.ndarray, n: int, seeds: int, steps: int) -> np.ndarray:
    array = np.asarray(indices)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[:2] != (seeds, steps) or not array.shape[2]:
        raise ValueError(
            f"indices of shape {array.shape} do not fit {seeds} seeds and {steps} steps: give (seeds, steps, B)."
        )
    if array.dtype.kind not in "iu" or (array.size and not (array.min() >= 0 and array.max() < n)):
        raise ValueError(f"an index is no sample's number: give integers from 0 to {n - 1}.")
    return array.astype(np.int32, copy=False)
