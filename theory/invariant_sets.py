"""Sets of parameters that training cannot leave: a unit switched off (sign), two units alike (permutation).

Both are linear subspaces of one layer's unit vectors (..., units, dim), whose columns have roles (``incoming``,
``bias``, ``norm``, ``outgoing``; see ``nets.unit_layer``). Every per-sample gradient at a point of the set lies in the
set, so SGD, with momentum and weight decay too, keeps to it: proved in :mod:`theory.invariance_proof`.

==========  =================================================  ==================================================
statistics  sign set of unit u, for σ(0) = 0                   permutation set of units u, v, for any σ
==========  =================================================  ==================================================
none        w_in = 0, b = 0, w_out = 0                         all entries of u equal those of v
batch       γ = 0, β = 0, w_out = 0; w_in and b are free       the same (and equal running statistics in eval mode)
group       the same as batch                                  the same, for u and v of one group
==========  =================================================  ==================================================

A BatchNorm without γ, β on batch statistics has the sign set w_in = 0, w_out = 0. Units of a convolution are its
channels. Source: Chen et al. (2023), sections 2 and 3; the rows with statistics are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class InvariantSet(Protocol):
    """A subspace of the unit vectors (..., units, dim) of one layer."""

    def normal(self, vectors: Tensor) -> Tensor:
        """The component across the set, in an orthonormal basis, shape (..., codimension)."""

    def project(self, vectors: Tensor) -> Tensor:
        """The nearest point of the set, shape (..., units, dim); of a gradient: its tangent part."""

    def directions(self, vectors: Tensor) -> Tensor:
        """The orthonormal basis of :meth:`normal`, shape (codimension, units, dim), for vectors of these sizes."""


@dataclass(frozen=True, eq=False)
class SignSet:
    """Unit ``unit`` switched off: its entries in ``columns``, shape (dim,), bool, are zero."""

    unit: int
    columns: Tensor

    def normal(self, vectors: Tensor) -> Tensor:
        """The entries that have to vanish, shape (..., codimension)."""
        return vectors[..., self.unit, self.columns]

    def project(self, vectors: Tensor) -> Tensor:
        """The same with those entries at zero."""
        row = torch.where(self.columns, torch.zeros_like(vectors[..., self.unit, :]), vectors[..., self.unit, :])
        return _with_row(vectors, self.unit, row)

    def directions(self, vectors: Tensor) -> Tensor:
        """One unit vector per entry that has to vanish."""
        places = torch.nonzero(self.columns)[:, 0]
        basis = vectors.new_zeros(len(places), *vectors.shape[-2:])
        basis[torch.arange(len(places)), self.unit, places] = 1.0
        return basis


@dataclass(frozen=True)
class PermutationSet:
    """Units ``first`` and ``second`` alike in every entry."""

    first: int
    second: int

    def normal(self, vectors: Tensor) -> Tensor:
        """(w_first - w_second)/√2, shape (..., dim)."""
        return (vectors[..., self.first, :] - vectors[..., self.second, :]) / 2**0.5

    def project(self, vectors: Tensor) -> Tensor:
        """The same with both units at their mean."""
        mean = (vectors[..., self.first, :] + vectors[..., self.second, :]) / 2
        return _with_row(_with_row(vectors, self.first, mean), self.second, mean)

    def directions(self, vectors: Tensor) -> Tensor:
        """(e_first - e_second)/√2 for every column."""
        dim = vectors.shape[-1]
        basis = vectors.new_zeros(dim, *vectors.shape[-2:])
        basis[torch.arange(dim), self.first, torch.arange(dim)] = 0.5**0.5
        basis[torch.arange(dim), self.second, torch.arange(dim)] = -(0.5**0.5)
        return basis


def distance(invariant_set: InvariantSet, vectors: Tensor) -> Tensor:
    """Euclidean distance to the set, shape (...)."""
    return torch.linalg.vector_norm(invariant_set.normal(vectors), dim=-1)


def sign_columns(columns: Sequence[str], norm: str = "none") -> Tensor:
    """Which entries vanish on the sign set of a unit with these columns' roles, shape (dim,), bool.

    Args:
        columns: a role per column.
        norm: the statistics on the unit's way, ``none``, ``batch``, ``group`` or ``batch+none``.

    Raises:
        ValueError: statistics for which no sign set is known.
    """
    affine = "norm" in columns
    if norm == "none" or (norm == "batch" and not affine):
        normal = {"incoming", "bias", "outgoing"} if norm == "none" else {"incoming", "outgoing"}
    elif norm in ("batch", "group") and affine:
        normal = {"norm", "outgoing"}
    elif norm == "batch+none":
        normal = set(columns)
    elif norm == "ignored":
        raise ValueError("the published rule leaves out what moves with the unit: describe layers with rule='full'.")
    else:
        raise ValueError(f"no sign set is known for units with statistics '{norm}': use the permutation set.")
    return torch.tensor([role in normal for role in columns])


def sign_set(unit: int, columns: Sequence[str], norm: str = "none") -> SignSet:
    """The sign set of one unit; arguments and errors as in :func:`sign_columns`."""
    return SignSet(unit, sign_columns(columns, norm))


def permutation_set(first: int, second: int, units: int, groups: int = 1, norm: str = "none") -> PermutationSet:
    """The permutation set of two of a layer's ``units``.

    Raises:
        ValueError: units that are not two of the layer's, or whose normalisation does not treat them alike.
    """
    if first == second or not (0 <= first < units and 0 <= second < units):
        raise ValueError(f"units {first} and {second} are no pair out of {units}: choose two numbers from 0 on.")
    if norm == "ignored":
        raise ValueError("the published rule leaves out what moves with the unit: describe layers with rule='full'.")
    if first * groups // units != second * groups // units:
        raise ValueError(f"units {first} and {second} are normalised in different groups: choose two of one group.")
    return PermutationSet(first, second)


def sign_distances(vectors: Tensor, columns: Tensor) -> Tensor:
    """Distance of every unit to its sign set, shape (..., units); ``columns`` from :func:`sign_columns`."""
    return torch.linalg.vector_norm(vectors[..., columns], dim=-1)


def pair_distances(vectors: Tensor) -> Tensor:
    """Distance of every pair to its permutation set, ‖w_u - w_v‖/√2 without cancellation, (..., units, units)."""
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist") / 2**0.5


def _with_row(vectors: Tensor, unit: int, row: Tensor) -> Tensor:
    changed = vectors.clone()
    changed[..., unit, :] = row
    return changed
