"""How many units of a layer are different ones: vanishing units, similarity, and two counts of independent units.

Units are rows of a tensor (..., units, dim), as ``nets.units`` gives them; leading axes are batch axes (seeds, times).
Source: Chen et al. (2023), Fig. 3, 4 and 6.
"""

from __future__ import annotations

import numba  # type: ignore[import-untyped]
import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage  # type: ignore[import-untyped]
from scipy.spatial.distance import squareform  # type: ignore[import-untyped]
from torch import Tensor

SAME = 0.1  # the published threshold on the normalised distance
VANISHED = 0.1  # the published threshold on the norm, as a share of the layer's largest


def vanishing(vectors: Tensor, threshold: float = VANISHED) -> Tensor:
    """‖w_k‖ / max_j ‖w_j‖ < ``threshold``, shape (..., units), bool. In a layer of zeros every unit vanishes."""
    return _vanishing(_checked(vectors).square().sum(-1), threshold)


def _vanishing(squares: Tensor, threshold: float) -> Tensor:
    norms = _finite(squares).sqrt()
    largest = norms.amax(-1, keepdim=True)
    return (norms < threshold * largest) | (largest == 0)


def normalized_distance(vectors: Tensor, eps: float = 1e-8) -> Tensor:
    """d_ij = 2‖w_i - w_j‖² / (‖w_i‖² + ‖w_j‖² + eps), shape (..., units, units), in [0, 4]; 2 where orthogonal.

    One matrix product; differences below the dtype's rounding of ‖w‖² come out as 0, so d < 1e-6 means little in
    float32. eps = 1e-8 is that of Fig. 3 and 4, eps = 0 that of Fig. 6.

    >>> normalized_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), eps=0.0).tolist()
    [[0.0, 2.0, 4.0], [2.0, 0.0, 2.0], [4.0, 2.0, 0.0]]
    """
    return _distance(_gram(_checked(vectors)), eps)


def _distance(product: Tensor, eps: float) -> Tensor:
    """The same from W Wᵀ, which is overwritten."""
    squares = _finite(product.diagonal(dim1=-2, dim2=-1).clone())
    total = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    # In place: a layer of thousands of units makes the matrix, not the arithmetic, expensive.
    distance = product.mul_(-2).add_(total).clamp_(min=0).mul_(2)
    distance.div_(total.add_(eps).clamp_(min=torch.finfo(total.dtype).tiny))  # two units at zero are the same unit
    distance.diagonal(dim1=-2, dim2=-1).zero_()
    return distance


def _gram(vectors: Tensor) -> Tensor:
    """W Wᵀ; numpy computes half of it for a matrix on the CPU, the other half being the same."""
    if vectors.ndim == 2 and vectors.device.type == "cpu" and vectors.dtype in (torch.float32, torch.float64):
        rows = vectors.detach().contiguous().numpy()
        return torch.from_numpy(rows @ rows.T)
    return vectors @ vectors.transpose(-1, -2)


def independent_count(vectors: Tensor, same: float = SAME, vanished: float = VANISHED, eps: float = 1e-8) -> Tensor:
    """The published count of independent units, shape (...), int64, vanishing units left out.

    Pairs i < j with d_ij < ``same`` are gone through in lexicographic order: skipped when j is taken; else i and j are
    taken and j joins i's list. Untouched units are lists of their own; the count is the number of lists. A unit that
    joined a list may still start one: a chain 0 ~ 1 ~ 2 with 0 far from 2 counts two, and the order of units matters.
    """
    return _greedy(vectors, same, vanished, eps)[0]


def independent_lists(vectors: Tensor, same: float = SAME, vanished: float = VANISHED, eps: float = 1e-8) -> Tensor:
    """The list each unit is in under the published count, named by its first unit; -1 if vanishing, (..., units)."""
    return _greedy(vectors, same, vanished, eps)[1]


def _greedy(vectors: Tensor, same: float, vanished: float, eps: float) -> tuple[Tensor, Tensor]:
    """Counts (...) and lists (..., units) of the published scan; one matrix product, and the scan is the host's."""
    product = _gram(_checked(vectors))
    present = ~_vanishing(product.diagonal(dim1=-2, dim2=-1), vanished)
    close, units = _distance(product, eps) < same, product.shape[-1]
    pairs = close.reshape(-1, units, units).cpu().numpy()
    scanned = _scan(pairs, present.reshape(-1, units).cpu().numpy())
    counts, lists = (torch.from_numpy(result).to(close.device) for result in scanned)
    return counts.view(close.shape[:-2]), lists.view(close.shape[:-1])


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _scan(close: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    layers, units = present.shape
    counts, lists = np.zeros(layers, np.int64), np.full((layers, units), -1)
    for layer in range(layers):
        for i in range(units):
            if not present[layer, i]:
                continue
            leads = False
            for j in range(i + 1, units):
                if close[layer, i, j] and present[layer, j] and lists[layer, j] < 0:
                    lists[layer, j] = i
                    leads = True
            if lists[layer, i] < 0:
                lists[layer, i] = i
                leads = True
            counts[layer] += leads
    return counts, lists


def linkage_count(vectors: Tensor, same: float = SAME, vanished: float = VANISHED, eps: float = 1e-8) -> int:
    """Clusters of one layer's non-vanishing units under average linkage, cut at distance ``same``.

    The count that does not depend on the order of units: clusters merge while their mean distance is below ``same``.
    """
    kept = vectors[~vanishing(_one_layer(vectors), vanished)]
    if len(kept) < 2:
        return len(kept)
    heights = _linkage(normalized_distance(kept, eps))[:, 2]
    return len(kept) - int((heights < same).sum())


def cluster_order(distance: Tensor, clusters: int) -> Tensor:
    """The order of units that shows ``clusters`` clusters of average linkage as blocks, largest first, (units,), int64.

    Within a cluster units keep their order. For similarity heat-maps: ``distance[order][:, order]``.

    Raises:
        ValueError: a distance that is not a square matrix, or a number of clusters it cannot have.
    """
    units = distance.shape[-1]
    if distance.ndim != 2 or distance.shape[0] != units:
        raise ValueError(f"a distance of shape {tuple(distance.shape)} cannot be ordered: give (units, units).")
    if not 1 <= clusters <= units:
        raise ValueError(f"{units} units do not make {clusters} clusters: ask for 1 to {units}.")
    labels = cut_tree(_linkage(distance), clusters)[:, 0] if units > 1 else np.zeros(1, int)
    sizes = np.bincount(labels)
    return torch.from_numpy(np.lexsort((np.arange(units), labels, -sizes[labels])))


def _linkage(distance: Tensor) -> np.ndarray:
    return np.asarray(linkage(squareform(distance.detach().cpu().double().numpy(), checks=False), "average"))


def _checked(vectors: Tensor) -> Tensor:
    if vectors.ndim < 2 or 0 in vectors.shape:
        raise ValueError(f"unit vectors of shape {tuple(vectors.shape)} are not usable: give (..., units, dim).")
    return vectors


def _finite(squares: Tensor) -> Tensor:
    if not torch.isfinite(squares).all():
        raise ValueError("unit vectors have NaN or infinite entries: leave diverged networks out.")
    return squares


def _one_layer(vectors: Tensor) -> Tensor:
    if vectors.ndim != 2:
        raise ValueError(f"average linkage takes one layer (units, dim), not {tuple(vectors.shape)}: loop over layers.")
    return vectors
