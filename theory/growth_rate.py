"""Is a set attracting? The growth rate of the distance to it, from per-sample gradients at one state.

For a component x of the parameters under SGD's SDE, dx = -(∇L + λx) dt + √(ηκ) C^{1/2} dW with C the covariance of one
sample's gradient of x, Itô gives

    d ln‖x‖ = [-x·(∇L + λx) + (ηκ/2)(tr C - 2 x̂ᵀC x̂)] / ‖x‖² dt + √(ηκ x̂ᵀC x̂)/‖x‖ dB.

With x a unit's own entries it is the rate to its sign set, with x = (w_u - w_v)/√2 that to a pair's permutation set.
Negative and persistent: the unit is being collapsed. Noise along x shrinks it and noise across it lengthens it.
Rates are per unit of SDE time; one SGD step lasts η/(1-μ) with momentum μ, which also stands for η above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from theory.minibatch import Minibatch
from theory.prediction import Reference
from theory.schedule import effective_step_size

SOURCE = Reference("Chen, Kunin, Yamamura, Ganguli", 2023, "attractivity; Itô on ln‖θ_j‖ (ours)")
CHUNK = 1 << 24  # numbers held at once when many pairs are asked for


@dataclass(frozen=True, eq=False)
class GrowthRate:
    """d ln‖x‖/dt by its terms, each of shape (..., components).

    Attributes:
        drift: -x·(∇L + λx)/‖x‖², what gradient flow does.
        noise: (ηκ/2)(tr C - 2 x̂ᵀC x̂)/‖x‖², what noise does on average.
        along: ηκ x̂ᵀC x̂/‖x‖², the variance of ln‖x‖ per unit of time.
        trace: ηκ tr C/‖x‖².
        standard_error: of drift + noise, for gradients of a random part of the samples; 0 when all were given.
    """

    drift: Tensor
    noise: Tensor
    along: Tensor
    trace: Tensor
    standard_error: Tensor

    @property
    def value(self) -> Tensor:
        """The rate."""
        return self.drift + self.noise

    @property
    def read_as_stratonovich(self) -> Tensor:
        """The rate if the noise were Stratonovich's: ηκ tr C/2‖x‖² more where gradients are linear in x (a rival)."""
        return self.drift + self.noise + self.trace / 2


@dataclass(frozen=True)
class Dynamics:
    """How SGD steps.

    Attributes:
        step_size: η.
        minibatch: size and sampling.
        momentum: μ of the heavy ball m ← μm + g.
        weight_decay: λ of the gradient ∇L + λθ.
        samples: how many the minibatches are drawn from; None when the gradients given are of all of them.
    """

    step_size: float
    minibatch: Minibatch = Minibatch()
    momentum: float = 0.0
    weight_decay: float = 0.0
    samples: int | None = None


def sign_growth(vectors: Tensor, gradients: Tensor, dynamics: Dynamics) -> GrowthRate:
    """The growth rate of ‖w_u‖ for every unit, terms of shape (..., units); NaN for a unit that is on its set.

    Args:
        vectors: entries that vanish on the sign sets, shape (..., units, dim).
        gradients: per-sample gradients of them, shape (..., n, units, dim), of all samples or of a random part
            (``dynamics.samples``). Gradients of minibatches, as BatchNorm on batch statistics needs them, serve as
            well: they are samples of a draw with ``Minibatch(1)``.

    Raises:
        ValueError: shapes that do not fit, fewer than two gradients.
    """
    _check(vectors, gradients)
    return _growth(vectors, gradients, dynamics)


def pair_growth(vectors: Tensor, gradients: Tensor, pairs: Tensor, dynamics: Dynamics) -> GrowthRate:
    """The growth rate of ‖w_u - w_v‖ for pairs of units, terms of shape (..., pairs); NaN for a pair on its set.

    Args:
        vectors: all entries of the units, shape (..., units, dim).
        gradients: per-sample gradients of them, shape (..., n, units, dim), as for :func:`sign_growth`.
        pairs: unit numbers, shape (pairs, 2).

    Raises:
        ValueError: shapes that do not fit, fewer than two gradients.
    """
    _check(vectors, gradients)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs of shape {tuple(pairs.shape)} are not usable: give (pairs, 2) unit numbers.")
    each = max(gradients[..., 0, :].numel(), 1)
    parts = [
        _growth(_across(vectors, part), _across(gradients, part), dynamics)
        for part in pairs.split(max(CHUNK // each, 1))
    ]
    fields = ("drift", "noise", "along", "trace", "standard_error")
    return GrowthRate(*(torch.cat([getattr(part, name) for part in parts], -1) for name in fields))


def _across(tensor: Tensor, pairs: Tensor) -> Tensor:
    """(w_u - w_v)/√2 of every pair."""
    return (tensor[..., pairs[:, 0], :] - tensor[..., pairs[:, 1], :]) / 2**0.5


def unit_growth(theta: Tensor, gradients: Tensor, units: Sequence[Tensor], dynamics: Dynamics) -> GrowthRate:
    """:func:`sign_growth` of units of any sizes from whole states, terms of shape (..., units); nothing is gathered.

    Args:
        theta: states, shape (..., p).
        gradients: per-sample gradients, shape (..., n, p), as for :func:`sign_growth`.
        units: where each unit's own entries lie in θ.

    Raises:
        ValueError: shapes that do not fit, fewer than two gradients, no unit.
    """
    if gradients.shape[:-2] != theta.shape[:-1] or gradients.shape[-1] != theta.shape[-1] or not len(units):
        raise ValueError(
            f"states of shape {tuple(theta.shape)}, gradients of shape {tuple(gradients.shape)} and {len(units)} units "
            "do not fit: give (..., p), (..., n, p) and the places of one unit or more."
        )
    members = theta.new_zeros(theta.shape[-1], len(units))
    for column, at in enumerate(units):
        members[at, column] = 1.0
    mean = gradients.mean(-2)
    centred = gradients - mean.unsqueeze(-2)
    along = (centred * theta.unsqueeze(-2)) @ members
    return _rate(theta.square() @ members, (theta * mean) @ members, along, centred.square_() @ members, dynamics)


def _growth(x: Tensor, gradients: Tensor, dynamics: Dynamics) -> GrowthRate:
    mean = gradients.mean(-3)
    centred = gradients - mean.unsqueeze(-3)
    along = torch.einsum("...nkd,...kd->...nk", centred, x)
    return _rate(x.square().sum(-1), (x * mean).sum(-1), along, centred.square().sum(-1), dynamics)


def _rate(square: Tensor, pull: Tensor, along: Tensor, power: Tensor, dynamics: Dynamics) -> GrowthRate:
    """From ‖x‖² and x·ḡ, (..., components), and x·c and ‖c‖² of the centred gradients c, (..., n, components)."""
    given = along.shape[-2]
    samples = dynamics.samples or given
    if not 2 <= given <= samples:
        raise ValueError(f"{given} gradients of {samples} samples give no covariance: give 2 to {samples} of them.")
    # The covariance among all samples, without bias from the part of them seen.
    whole = 1.0 if given == samples else given / (given - 1) * (samples - 1) / samples
    eta = effective_step_size(dynamics.step_size, dynamics.momentum)
    scale = eta * dynamics.minibatch.variance_factor(samples) * whole
    share, power = along / square.unsqueeze(-2), power / square.unsqueeze(-2)  # x̂·c / ‖x‖ and ‖c‖² / ‖x‖²
    drift = -pull / square - dynamics.weight_decay
    spread, trace = scale * share.square().mean(-2), scale * power.mean(-2)
    # Delta method: the estimate is a mean over samples up to the square of the mean gradient's own error.
    influence = -share + scale * (power / 2 - share.square())
    error = influence.std(-2) * ((1 - given / samples) / given) ** 0.5
    return GrowthRate(drift, trace / 2 - spread, spread, trace, error)


def one_step_growth(vectors: Tensor, gradients: Tensor, step_size: float, weight_decay: float = 0.0) -> Tensor:
    """E[ln‖x - η(g_i + λx)‖ - ln‖x‖]/η over samples i, shape (..., components): exact for SGD with B = 1.

    What the SDE's rate approximates to first order in η; shapes as in :func:`sign_growth`, all samples given.
    """
    _check(vectors, gradients)
    moved = (1 - step_size * weight_decay) * vectors.unsqueeze(-3) - step_size * gradients
    norms = torch.linalg.vector_norm(moved, dim=-1).log().mean(-2)
    return (norms - torch.linalg.vector_norm(vectors, dim=-1).log()) / step_size


def _check(vectors: Tensor, gradients: Tensor) -> None:
    if gradients.ndim != vectors.ndim + 1 or gradients.shape[-2:] != vectors.shape[-2:] or vectors.ndim < 2:
        raise ValueError(
            f"vectors of shape {tuple(vectors.shape)} and gradients of shape {tuple(gradients.shape)} do not fit: give "
            "(..., units, dim) and (..., n, units, dim)."
        )
