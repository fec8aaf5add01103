"""The rank of a network's Jacobian ∂h_c(x_i)/∂θ: how many directions of θ its outputs on some inputs can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nets.features import DivergedError, evaluating, moved
from theory.streams import named_generator

BUDGET = 2**26  # entries at a time
PER_ROW = 8  # columns of a projected Jacobian


def network_jacobian_rank(
    module: nn.Module, X: Tensor, outputs: Sequence[int] | None = None, threshold: float = 1e-4, *,
    budget: int = BUDGET, seed: int = 0,
) -> int:  # fmt: skip
    """#{σ_i / σ_1 > ``threshold``} of the Jacobian; arguments and errors are those of :func:`jacobian_spectrum`.

    Source: Andriushchenko et al. (2023), rank of the Jacobian, for networks of several outputs.

    >>> X = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])  # one direction, read by two outputs
    >>> network_jacobian_rank(nn.Linear(2, 2, bias=False), X)
    2
    """
    spectrum = jacobian_spectrum(module, X, outputs, budget=budget, seed=seed)
    return int((spectrum > threshold * spectrum.max()).sum())


def jacobian_spectrum(
    module: nn.Module, X: Tensor, outputs: Sequence[int] | None = None, *, budget: int = BUDGET, seed: int = 0
) -> Tensor:
    """The singular values of J, rows ∂h_c(x_i)/∂θ for every input i and output c, descending, float64.

    Running statistics are used, so that rows belong to single inputs. Where J has more than ``budget`` entries, each
    row (of p entries, padded to a power of two) is multiplied by a fixed random sign per entry and Fourier
    transformed, and :data:`PER_ROW` random coefficients per row are kept. That projection keeps the rank of J for
    almost every draw and moves singular values by a factor of about 1 ± √(1/PER_ROW), so that a count above a
    threshold changes only by those within that factor of it.

    Args:
        X: inputs, shape (n, ...).
        outputs: which outputs, all of them when None.
        budget: entries of J held at a time; per-sample gradients are taken in chunks that fit.
        seed: of the stream "projection".

    Raises:
        ValueError: no trainable parameter or input, outputs that do not exist.
        DivergedError: a Jacobian that is NaN or infinite.

    Source: Halko, Martinsson, Tropp (2011), the subsampled random Fourier transform.
    """
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not trained or not len(X):
        raise ValueError(f"{len(X)} inputs and {len(trained)} trainable tensors have no Jacobian: give some of each.")
    with evaluating(module), torch.no_grad():
        count = module(next(moved(module, X, 1))).shape[-1]
    chosen = list(range(count)) if outputs is None else list(outputs)
    if not chosen or not all(0 <= c < count for c in chosen):
        raise ValueError(f"outputs {chosen} were asked of a network that has {count}: choose from 0 to {count - 1}.")
    p = sum(parameter.numel() for parameter in trained.values())
    rows = len(X) * len(chosen)
    project = _Fourier(p, min(PER_ROW * rows, p), seed) if rows * p > budget and PER_ROW * rows < p else None
    at_once = max(budget // p, 1)
    found = []
    with evaluating(module):
        for first in range(0, len(chosen), at_once):
            some = chosen[first : first + at_once]
            for x in moved(module, X, max(at_once // len(some), 1)):
                part = _rows(module, trained, x, some)
                found.append((part if project is None else project(part)).double())
    J = torch.cat(found)
    if not torch.isfinite(J).all():
        raise DivergedError("the Jacobian has NaN or infinite entries, so the network has diverged: leave it out.")
    return torch.linalg.svdvals(J)


def _rows(module: nn.Module, trained: dict[str, Tensor], x: Tensor, outputs: Sequence[int]) -> Tensor:
    """∂h_c(x_i)/∂θ, shape (inputs · outputs, p)."""
    chosen = torch.tensor(outputs, device=x.device)

    def values(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (one.unsqueeze(0),)).squeeze(0)[chosen]

    parts = torch.func.vmap(torch.func.jacrev(values), (None, 0))(trained, x)
    return torch.cat([part.flatten(2) for part in parts.values()], 2).flatten(0, 1)


class _Fourier:
    """Rows of p entries to ``columns`` each: random signs, Fourier transform, some coefficients at random, scaled."""

    def __init__(self, p: int, columns: int, seed: int) -> None:
        draws = named_generator(seed, "projection")
        self._signs = torch.from_numpy(draws.integers(0, 2, p, np.int8) * np.int8(2) - np.int8(1))
        self._length = 1 << (p - 1).bit_length()
        chosen = draws.choice(self._length // 2 - 1, columns // 2, replace=False) + 1
        self._chosen = torch.from_numpy(chosen)
        self._scale = ((self._length - 2) / (columns // 2)) ** 0.5  # keeps the expected norm of a row

    def __call__(self, rows: Tensor) -> Tensor:
        """Shape (rows, columns)."""
        signed = rows * self._signs.to(rows)
        spectrum = torch.fft.rfft(signed, self._length, norm="ortho")[:, self._chosen.to(rows.device)]
        return torch.view_as_real(spectrum).flatten(1) * self._scale
