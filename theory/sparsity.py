"""Sparsity measures, one definition each: how many different features a network has, and of what rank they are.

Leading axes of the arguments are batch axes (schedules, seeds, times); results keep them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from theory.relu_network import ReluNetwork

SCREENED, BLOCKS, ROWS, STRIP = 256, 8, 512, 64
ROUNDING = 1e-14
CHUNK = 2**24


def distinct_units(activations: Tensor, threshold: float = 0.99, normalize: bool = True) -> Tensor:
    """Which units stay when those never active and all but the last of each group of duplicates are dropped.

    A unit is a duplicate if |Pearson correlation| with a *later* unit exceeds ``threshold``. This is what the
    published scan keeps, which deletes one unit at a time: a unit that is reached has only kept units before it, and
    none of them is its duplicate, or it would have gone when it was reached itself. A unit of constant activation has
    no correlation and stays.

    Args:
        activations: shape (..., n, m), n inputs and m units.
        threshold: 0.99 for small networks, 0.999 in one dimension, 0.95 for deep networks.
        normalize: divide each input's activations by their norm first (rows of zeros stay zeros).

    Returns:
        shape (..., m), bool.

    Source: Andriushchenko et al. (2023), feature sparsity coefficient, and their code.
    """
    weights = _inverse_norms(activations) if normalize else activations.new_ones(*activations.shape[:-1], 1)
    alive = activations.amax(-2) > 0
    large = activations.ndim == 2 and activations.shape[-1] >= SCREENED
    duplicate = _screened_duplicates(activations, weights.double(), alive, threshold) if large else None
    if duplicate is None:
        normed = _standardized(activations.double() * weights.double())
        duplicate = largest_later(normed.transpose(-1, -2) @ normed) > threshold
    return alive & ~duplicate


def _standardized(phi: Tensor) -> Tensor:
    """Columns centred and of norm 1, zeros where a column is constant to rounding; correlations are their products."""
    mean = phi.mean(-2, keepdim=True)
    centred = phi - mean
    norm = torch.linalg.vector_norm(centred, dim=-2, keepdim=True)
    constant = norm <= ROUNDING * phi.shape[-2] ** 0.5 * mean.abs()
    return centred * (1 / norm).masked_fill(constant, 0.0)


def largest_later(correlation: Tensor) -> Tensor:
    """The largest |entry| to the right of the diagonal in each row of (..., m, m), shape (..., m)."""
    starts = range(0, correlation.shape[-1], STRIP)
    strips = [correlation[..., at : at + STRIP, at:].abs().triu_(1).amax(-1) for at in starts]
    return torch.cat(strips, -1)


def _screened_duplicates(activations: Tensor, weights: Tensor, alive: Tensor, threshold: float) -> Tensor | None:
    """The same for many units: most pairs are settled by an eighth of the inputs, the rest in float32, few in float64.

    With standardised columns c split into a head and a rest, |⟨c_i, c_j⟩| ≤ |head part| + ‖rest of c_i‖ ‖rest of c_j‖:
    a unit that no pair brings over the threshold is none. Others are held against the later unit that is most like
    them on the head, and what that leaves open against all. n rounding errors of float32 shift a correlation by at
    most n ε; units that close to the threshold are settled in float64. ``None`` where a unit varies so little around
    its mean that float32 could miss it.
    """
    n, units = activations.shape
    chunks = list(zip(activations.split(ROWS), weights.split(ROWS), strict=True))  # they stay in cache
    mean = torch.stack([w.T @ rows.double() for rows, w in chunks]).sum(0) / n
    square = torch.stack([w.square().T @ rows.double().square() for rows, w in chunks]).sum(0)
    variance = square - n * mean.square()
    if (alive & (variance <= 1e-6 * square).squeeze(0)).any():
        return None
    scale, margin = torch.where(alive, variance.rsqrt(), 0.0), n * torch.finfo(torch.float32).eps
    first = -(-len(chunks) // 8)

    def normed(parts: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        return (torch.addcmul(-mean, rows.double(), w).mul_(scale).float() for rows, w in parts)

    every = torch.arange(units, device=alive.device)
    head = _products(normed(chunks[:first]), every, units)
    rest = (1 - head.diagonal()).clamp(min=0).sqrt()
    reachable = (largest_later(head.abs() + rest * rest.unsqueeze(1)) > threshold - margin).nonzero().squeeze(-1)
    later = every > reachable.unsqueeze(1)
    like = (head[reachable].abs() * head.diagonal().rsqrt().nan_to_num(0.0, 0.0)).where(later, -1.0)
    partner = like.argmax(1)
    pair = head[reachable, partner]
    for part in normed(chunks[first:]):
        pair += (part[:, reachable] * part[:, partner]).sum(0)
    duplicate, settled = torch.zeros_like(alive), pair.abs() > threshold + margin
    duplicate[reachable[settled]] = True
    open_, later = reachable[~settled], later[~settled]
    if len(open_):
        correlation = head[open_] + _products(normed(chunks[first:]), open_, units)
        largest = correlation.abs().where(later, 0.0).amax(-1)
        duplicate[open_] = largest > threshold + margin
        close = open_[(largest - threshold).abs() <= margin]
        if len(close):
            exact = _standardized(activations.double() * weights)
            correlation = (exact[:, close].T @ exact).abs()
            duplicate[close] = ((correlation > threshold) & (every > close.unsqueeze(1))).any(-1)
    return duplicate


def _products(parts: Iterable[Tensor], columns: Tensor, units: int) -> Tensor:
    """Σ over parts (rows, units) of part[:, columns]ᵀ part, right of each block's first column."""
    total = torch.zeros(len(columns), units, device=columns.device)
    size = max(-(-len(columns) // BLOCKS), 1)
    blocks = [(at, columns[at : at + size], int(columns[at])) for at in range(0, len(columns), size)]
    for part in parts:
        for at, block, first in blocks:
            total[at : at + size, first:].addmm_(part[:, block].T, part[:, first:])
    return total


def feature_sparsity(activations: Tensor, threshold: float = 0.99, normalize: bool = True) -> Tensor:
    """The share of the n·m activations that are positive and belong to distinct units, shape (...).

    Arguments and source are those of :func:`distinct_units`.

    >>> phi = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    >>> feature_sparsity(phi, normalize=False)  # units 1 and 2 are duplicates: (2 + 2) / 12
    tensor(0.3333)
    """
    kept = distinct_units(activations, threshold, normalize)
    positive = torch.stack([(rows > 0).sum(-2) for rows in activations.split(ROWS, -2)]).sum(0).to(activations)
    return (positive * kept).sum(-1) / (activations.shape[-2] * activations.shape[-1])


def distinct_features(activations: Tensor, threshold: float = 0.99, normalize: bool = True) -> Tensor:
    """The number of distinct units, shape (...); see :func:`distinct_units`."""
    return distinct_units(activations, threshold, normalize).sum(-1).to(activations)


def active_fraction(activations: Tensor) -> Tensor:
    """The share of the n·m activations that are positive, duplicates counted, shape (...)."""
    return (activations > 0).to(activations).mean((-2, -1))


def pattern_distance(preactivations: Tensor, start: Tensor) -> Tensor:
    """The share of the n·m ReLUs that are on in one state and off in the other, shape (...)."""
    return ((preactivations > 0) != (start > 0)).to(preactivations).mean((-2, -1))


def effective_rank(singular_values: Tensor, exponential: bool = False) -> Tensor:
    """-Σ p ln p with p = σ/Σσ over non-zero σ (..., k), or its ``exponential``, shape (...).

    AVPF print the entropy itself; the exponential counts directions.
    Source: Roy, Vetterli (2007), Eq. 3; Andriushchenko et al. (2023).

    >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]), exponential=True)
    tensor(2.)
    """
    p = singular_values / singular_values.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return entropy.exp() if exponential else entropy


def numerical_rank(matrix: Tensor, threshold: float = 1e-4) -> Tensor:
    """#{σ_i / σ_1 > threshold} of matrices (..., r, c), shape (...); 0 for zero matrices and where one is not finite.

    Source: Andriushchenko et al. (2023), rank of the Jacobian.
    """
    finite = torch.isfinite(matrix).all((-2, -1))
    singular = torch.linalg.svdvals(matrix.where(finite[..., None, None], 0.0))
    return (singular > threshold * singular[..., :1]).sum(-1).to(matrix)


def jacobian_rank(network: ReluNetwork, theta: Tensor, X: Tensor, threshold: float = 1e-4) -> Tensor:
    """The rank of Φ(θ) on inputs X, AVPF's choice being the first p held-out ones, shape (...) for θ (..., p).

    Replicates are taken in chunks, so memory stays bounded over long trajectories.
    """
    flat = theta.reshape(-1, theta.shape[-1])
    chunk = max(1, CHUNK // (len(X) * network.size))
    ranks = [numerical_rank(network.jacobian(part, X), threshold) for part in flat.split(chunk)]
    return torch.cat(ranks).reshape(theta.shape[:-1])


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Σ σ_i of matrices (..., r, c), shape (...)."""
    return torch.linalg.svdvals(matrix).sum(-1)


def neuron_vectors(network: ReluNetwork, theta: Tensor) -> Tensor:
    """w_j |a_j| of the first layer's units, shape (..., m, d): where each looks and how much it contributes.

    In deeper networks |a_j| is the norm of the weights out of unit j.
    """
    (inner, _), (outer, _) = network.split(theta)[:2]
    return inner * torch.linalg.vector_norm(outer, dim=-2).unsqueeze(-1)


def _inverse_norms(activations: Tensor) -> Tensor:
    """1/‖row‖, and 0 for rows of zeros, shape (..., n, 1)."""
    norm = torch.linalg.vector_norm(activations, dim=-1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0.0)
