"""The SDE with its own loss against SGD at a small step: nothing measured enters the prediction."""

import torch

from nets.diagonal import initial_state, sgd
from theory.problem import gaussian_sparse
from theory.schedule import Schedule
from validation.ab_initio_checks import simulate


def test_mean_ln_alpha_at_a_small_step():
    """n = 40, d = 60, r = 6, η = 0.1: ln α itself within 3 %, its change within the error the SDE states for itself."""
    problem = gaussian_sparse(40, 60, 6)
    start, steps = initial_state(problem), 1000
    real = sgd(problem, start, [Schedule(0.1)], steps, seeds=range(512))
    assert real.finite.all()
    measured = (real.final.log_alpha - start.log_alpha).mean(-1)[0]
    sde = simulate(problem, start, 0.1, steps, 192, seed=0)
    assert sde.finite.all()
    predicted = sde["ln alpha"].values[-1]
    level = start.log_alpha.mean()
    assert abs(predicted.mean() - measured.mean()) < 0.03 * abs(level + measured.mean())
    law, drift2, quartic = sde["orders"].values[-1].mean(0)
    stated = ((drift2 + quartic) / law).item()
    assert 0.03 < stated < 0.1
    error = torch.hypot(predicted.std() / 192**0.5, measured.std() / 512**0.5)
    gap = abs(predicted.mean() - measured.mean())
    assert gap < 4 * error + stated * abs(predicted.mean())
    assert abs(measured.mean()) > 4 * error + stated * abs(predicted.mean())  # no noise: rejected
    assert (
        abs(predicted.mean() / 2 - measured.mean()) > 4 * error + stated * abs(predicted.mean()) / 2
    )  # half: rejected
