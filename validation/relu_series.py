"""What suite ``relu`` saves: loss curves, final measures, neurons, fitted functions, a loss surface."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from theory.sparsity import neuron_vectors
from validation.relu_runs import Ensemble, Experiment

MEASURES = ("sparsity", "distinct features", "rank", "ln test loss", "balance", "mean column norm")
SHOWN = 8  # runs of which neurons and fitted functions are kept
SURFACE = 41


def experiment_series(
    experiment: Experiment, real: Sequence[Ensemble], predicted: Sequence[Ensemble | None], flow: Ensemble
) -> xr.Dataset:
    """All series of one experiment; names and dimensions start with ``relu``."""
    name = f"relu {experiment.name}"
    cells, runs = f"relu_{experiment.name}_schedule", f"relu_{experiment.name}_seed"
    labels = [schedule.label for schedule in experiment.schedules]
    data: dict[str, xr.DataArray] = {}
    for kind, ensembles in (("sgd", real), ("sde", predicted)):
        for measure in MEASURES:
            rows = [_padded(e.final[measure], len(real[0].finite)) for e in ensembles if e is not None]
            known = [label for label, e in zip(labels, ensembles, strict=True) if e is not None]
            values = xr.DataArray(np.stack(rows), dims=(cells, runs), coords={cells: known})
            data[f"{name} {measure} {kind}"] = values.reindex({cells: labels})
        clock = f"relu_{experiment.name}_{kind}_step"
        first = next(e for e in ensembles if e is not None)
        curves = [_curve(e, len(first.steps)) for e in ensembles]
        data[f"{name} loss {kind}"] = xr.DataArray(
            np.stack(curves), dims=(cells, clock, "relu_quantile"),
            coords={cells: labels, clock: first.steps.numpy(), "relu_quantile": [0.1, 0.5, 0.9]},
        )  # fmt: skip
    data |= _states(experiment, name, cells, labels, real, predicted)
    if experiment.name == "two-layer":
        data |= surface_series(experiment, real, flow)
    return xr.Dataset(data)


def _padded(values: Tensor, length: int) -> np.ndarray:
    padded = np.full(length, np.nan)
    padded[: len(values)] = values.numpy()
    return padded


def _curve(ensemble: Ensemble | None, length: int) -> np.ndarray:
    """Quantiles over finite runs of the loss, shape (steps, 3)."""
    if ensemble is None or not bool(ensemble.finite.any()):
        return np.full((length, 3), np.nan)
    return np.quantile(ensemble.loss[:, ensemble.finite].numpy(), [0.1, 0.5, 0.9], axis=1).T


def _first_finite(ensemble: Ensemble | None, p: int, count: int) -> Tensor:
    """θ of the first finite runs, shape (count, p), NaN where there are fewer."""
    theta = torch.full((count, p), torch.nan, dtype=torch.float64)
    if ensemble is not None:
        found = ensemble.theta[ensemble.finite][:count]
        theta[: len(found)] = found
    return theta


def _states(
    experiment: Experiment, name: str, cells: str, labels: list[str], real: Sequence[Ensemble],
    predicted: Sequence[Ensemble | None],
) -> dict[str, xr.DataArray]:  # fmt: skip
    """Neurons of the planar network, fitted functions of the one-dimensional one."""
    data, network = {}, experiment.network
    for kind, ensembles in (("sgd", real), ("sde", predicted)):
        theta = torch.stack([_first_finite(e, network.size, SHOWN) for e in ensembles])
        if experiment.name == "two-layer":
            data[f"{name} neurons {kind}"] = xr.DataArray(
                neuron_vectors(network, theta).numpy(), dims=(cells, "relu_shown", "relu_unit", "relu_axis"),
                coords={cells: labels},
            )  # fmt: skip
        if experiment.problem.d == 1:
            X = experiment.problem.X
            grid = torch.linspace(float(X.min()) - 0.1, float(X.max()) + 0.1, 301, dtype=X.dtype)
            data[f"{name} function {kind}"] = xr.DataArray(
                network(theta, grid.unsqueeze(1)).numpy(), dims=(cells, "relu_shown", "relu_x"),
                coords={cells: labels, "relu_x": grid.numpy()},
            )  # fmt: skip
            data[f"{name} target"] = xr.DataArray(
                experiment.problem.y.numpy(), dims=("relu_point",), coords={"relu_point": X[:, 0].numpy()}
            )
    return data


def surface_series(experiment: Experiment, real: Sequence[Ensemble], flow: Ensemble) -> dict[str, xr.DataArray]:
    """ln of training and test loss on the plane through the start, gradient flow's end and SGD's end.

    The end is that of the first finite run on the last schedule that has one. Coordinates are along the orthonormal
    pair (flow's end - start, then SGD's); ``relu surface points`` holds the three points.
    """
    ends = [e.theta[e.finite][0] for e in real if bool(e.finite.any())]
    if not ends:
        return {}
    start, there = experiment.start, flow.theta[0]
    first = (there - start) / (there - start).norm()
    rest = ends[-1] - start
    second = rest - (rest @ first) * first
    second = second / second.norm()
    points = torch.stack([torch.stack([(p - start) @ first, (p - start) @ second]) for p in (start, there, ends[-1])])
    margin = 0.25 * float(points.abs().max())
    a = torch.linspace(float(points[:, 0].min()) - margin, float(points[:, 0].max()) + margin, SURFACE).double()
    b = torch.linspace(float(points[:, 1].min()) - margin, float(points[:, 1].max()) + margin, SURFACE).double()
    theta = start + a.view(-1, 1, 1) * first + b.view(1, -1, 1) * second
    problem, network = experiment.problem, experiment.network
    held_out = (network(theta, problem.X_test) - problem.y_test).square().mean(-1) / 2
    surfaces = {"train": experiment.loss(theta), "test": held_out}
    found = {
        f"relu surface {kind}": xr.DataArray(
            values.clamp(min=1e-12).log().numpy(), dims=("relu_a", "relu_b"),
            coords={"relu_a": a.numpy(), "relu_b": b.numpy()},
        )
        for kind, values in surfaces.items()
    }  # fmt: skip
    found["relu surface points"] = xr.DataArray(
        points.numpy(), dims=("relu_point_of_interest", "relu_axis"),
        coords={"relu_point_of_interest": ["start", "gradient flow", "SGD"]},
    )  # fmt: skip
    return found
