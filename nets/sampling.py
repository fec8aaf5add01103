"""What a run draws: minibatch indices and label perturbations per seed, from named streams.

A seed's draws depend on (root seed, seed) alone: not on how many seeds run, nor on how the run is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from theory.minibatch import Minibatch
from theory.streams import named_generator


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


class LabelNoiseStream:
    """Standard normal label perturbations, fresh for every sample drawn, for several seeds."""

    def __init__(self, size: int, seeds: Sequence[int], root_seed: int) -> None:
        self._size = size
        self._generators = [named_generator(root_seed, "label noise", seed) for seed in seeds]

    def block(self, steps: int) -> np.ndarray:
        """The next ``steps`` perturbations, shape (seeds, steps, B)."""
        return np.stack([g.standard_normal((steps, self._size)) for g in self._generators])
