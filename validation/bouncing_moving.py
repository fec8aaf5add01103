"""The bouncing law while the valley still turns: replicas early in training, in an eigenbasis that moves with them.

The steps are cut into blocks. In each the basis is that of the Hessian at the replicas' mean where the block begins,
found from the basis before (Lanczos with a warm start), and displacements are taken along it. The basis of the first
block, kept to the end, sees the same steps: it is the rival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from nets.curvature import hessian
from nets.lanczos import eigenpairs
from nets.objective import Objective
from nets.replicas import replicas
from theory.bouncing import SOURCE
from theory.prediction import Prediction
from validation.bouncing_checks import ERROR, SUITE, scattered
from validation.bouncing_runs import Setting, draws_of, leave_one_out, survivors
from validation.check import Check, Claim, Rival, judge

MOVING = Claim(
    "the law holds in a moving eigenbasis while training goes on",
    "corr(d_k, d_{k+1}) = μ - ηλ_k(t)/2 along e_k(t), both renewed every block of steps;  slope = 1,  1 - R² = 0",
    "Early in training eigenvectors turn away within hundreds of steps; the basis of the first block falsifies it.",
)


@dataclass(frozen=True, eq=False)
class Following:
    """Displacements d of R replicas along K directions, block by block; float64 on the CPU.

    Attributes:
        curvature: λ_k where each block begins, shape (blocks, K).
        products, squares: Σ d_t d_{t+1} and Σ d_t² of the moving basis, shape (blocks, R, K).
        fixed_products, fixed_squares: the same of the first block's basis.
        overlap: ‖Eᵀ e_k‖² of the last basis E with the first one's e_k, shape (K,).
        finite: which replicas stayed finite, one entry for each that set out.
    """

    setting: Setting
    curvature: Tensor
    products: Tensor
    squares: Tensor
    fixed_products: Tensor
    fixed_squares: Tensor
    overlap: Tensor
    finite: Tensor

    def measured(self, weights: Tensor, fixed: bool = False) -> Tensor:
        """Autocorrelation of every direction over all blocks, shape (K,), replicas weighted by (R,)."""
        products = self.fixed_products if fixed else self.products
        squares = self.fixed_squares if fixed else self.squares
        return (weights @ products.sum(0)) / (weights @ squares.sum(0))

    def predicted(self, weights: Tensor, fixed: bool = False) -> Tensor:
        """The law's: of every block's curvature, blocks weighted by their displacements; or of the first block's."""
        law = self.setting.law
        if fixed:
            return law.displacement_autocorrelation(self.curvature[0])
        share = torch.einsum("r,brk->bk", weights, self.squares)
        return (share * law.displacement_autocorrelation(self.curvature)).sum(0) / share.sum(0)


def follow(
    objective: Objective, setting: Setting, state: tuple[Tensor, Tensor], runs: int, blocks: int, block: int, K: int,
    root: int,
) -> Following:  # fmt: skip
    """``runs`` replicas from ``state``, watched for ``blocks`` blocks of ``block`` steps after one block to part in.

    Raises:
        ValueError: fewer than two replicas stay finite.
    """
    draws = draws_of(setting, objective.n, runs, "moving", root)
    theta, mass = (part.expand(runs, -1) for part in state)
    theta, mass = replicas(objective, theta, mass, setting.step_size, block, draws, setting.momentum)
    first = E = torch.empty(0)
    curvature, sums = list[Tensor](), list[tuple[Tensor, Tensor]]()
    for number in range(1, blocks + 1):
        mean = theta[survivors(theta, setting)].mean(0)
        found = eigenpairs(hessian(objective, mean), K, start=E if len(E) else None, tolerance=1e-2)
        curvature.append(found.values.double().cpu())
        E = found.vectors
        first = first if len(first) else E
        along, seen = torch.cat([E, first], 1), list[Tensor]()

        def watch(_: int, theta: Tensor, along: Tensor = along, seen: list[Tensor] = seen) -> None:
            seen.append(theta @ along)

        theta, mass = replicas(
            objective, theta, mass, setting.step_size, block,
            lambda k, start=number * block: draws(start + k), setting.momentum, watch,  # type: ignore[misc]
        )  # fmt: skip
        sums.append(_displacements(torch.stack(seen).double().cpu()))
    finite = survivors(theta, setting).cpu()
    products, squares = (torch.stack(part)[:, finite] for part in zip(*sums, strict=True))
    return Following(
        setting, torch.stack(curvature), products[..., :K], squares[..., :K], products[..., K:], squares[..., K:],
        (E.T @ first).square().sum(0).double().cpu(), finite,
    )  # fmt: skip


def moving_checks(following: Following) -> list[Check]:
    """Slope and R² in the moving basis; in the fixed one as the rival."""
    runs, (blocks, K) = int(following.finite.sum()), following.curvature.shape

    def slope(fixed: bool) -> Callable[[Tensor], float]:
        def value(weights: Tensor) -> float:
            predicted = following.predicted(weights, fixed)
            centred = predicted - predicted.mean()
            return float((following.measured(weights, fixed) * centred).sum() / centred.square().sum())

        return value

    def spread(fixed: bool) -> Callable[[Tensor], float]:
        def value(weights: Tensor) -> float:
            measured, predicted = following.measured(weights, fixed), following.predicted(weights, fixed)
            return float((measured - predicted).square().sum() / (measured - measured.mean()).square().sum())

        return value

    setting = f"{following.setting.label}, {blocks} bases of {K}, early"
    given = "H at the mean of the replicas, block by block"
    checks = []
    for observable, statistic, value, null, error in (
        ("slope", slope, 1.0, 0.0, ERROR),
        ("1 - R²", spread, 0.0, 1.0, 0.02),
    ):
        moving, fixed = (scattered(leave_one_out(statistic(kept), runs), following.finite) for kept in (False, True))
        prediction = Prediction(observable, torch.tensor(value), null, error, SOURCE, given=given)
        rivals = [Rival("the basis of the first block", value, fixed)]
        if observable == "slope":
            rivals += [Rival("white increments: 0", 0.0), Rival("-ηλ", 2.0), Rival("-1 throughout", 0.0)]
        checks.append(judge(SUITE, MOVING, setting, prediction, moving, finite=following.finite, rivals=rivals))
    return checks


def dataset(following: Following) -> xr.Dataset:
    """Autocorrelation of every direction, measured and predicted, in the moving and in the first block's basis."""
    runs = int(following.finite.sum())
    even = torch.full((runs,), 1 / runs, dtype=torch.float64)
    curves = {
        f"{basis} {what}": getattr(following, what)(even, fixed).numpy()
        for basis, fixed in (("moving", False), ("first", True))
        for what in ("measured", "predicted")
    }
    data = {f"bouncing basis {name}": (("bouncing_turning",), values) for name, values in curves.items()}
    return xr.Dataset(data, coords={"bouncing_turning": np.arange(1, following.curvature.shape[1] + 1)})


def _displacements(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ d_t d_{t+1} and Σ d_t² of coordinates (steps, R, K), less the replicas' mean, which is drift."""
    d = (x - x.nanmean(1, keepdim=True)).diff(dim=0)
    return (d[1:] * d[:-1]).sum(0), (d[1:].square() + d[:-1].square()).sum(0) / 2
