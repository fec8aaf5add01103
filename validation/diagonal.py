"""Suite ``diagonal``: what the SDEs predict for diagonal networks, against SGD and GD."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from nets.diagonal import gd, initial_state, sgd, standard_measurements
from theory import alpha_decay
from theory.closure import mean_field_closure
from theory.diagonal import DiagonalState
from theory.problem import Regression, diabetes_quadratic, gaussian_sparse, read_table
from theory.schedule import Schedule, stack_step_sizes
from theory.streams import seed_of
from theory.trajectory import Probe, Trajectory, linear_grid, step_weights, widening_grid
from validation import ab_initio_checks as ab_initio
from validation import diagonal_checks as claims
from validation.check import Check, Verdict
from validation.diagonal_checks import Cell
from validation.diagonal_series import ensemble_series
from validation.loss_surface import surface
from validation.settings import DiagonalSettings, RunSettings
from validation.suite import Outcome, Progress

CLAIMS = [
    claims.NOISY_LABELS, claims.EXACT_LAW, claims.SDE_LAW, claims.LEVEL_LAW, claims.FINITE_STEP_LAW,
    claims.COORDINATES, claims.END_POINT, claims.END_POINT_LEVEL, claims.END_POINT_PROGRESS, claims.ORDER,
    ab_initio.SDE_AB_INITIO, ab_initio.SDE_LEVEL, ab_initio.CLOSURE_ALPHA, ab_initio.CLOSURE_LEVEL,
]  # fmt: skip
END_POINT_ERROR = 0.17
"""Error stated for the end point from the realised α: z leaves the row space of X by third order in η r x."""
END_POINT_ERROR_FROM_LEVEL = 0.15
CLOSURE_STEPS = {"quick": 2000, "standard": 9900, "paper": 9900}
CLOSURE_ETAS = [0.15, 0.25, 0.282, 0.3]
OK, MISS = Verdict.AGREES, Verdict.DISAGREES
MISSES = {0.25: (MISS, MISS), 0.282: (MISS, MISS), 0.3: (MISS, OK)}
# The closure predicts the mean loss; late in a converging run the median, which runs near divergence cannot move, lies
# below it.
CLOSURE_MISSES = {2000: MISSES, 9900: MISSES | {0.15: (OK, MISS)}}
"""Where the closure is known to miss what a useful one would reach: verdicts expected of (ln α, level)."""
SDE_ETAS = [0.1, 0.5]
SDE_STEPS = {"quick": 1000, "standard": 3000, "paper": 5000}


def run(settings: RunSettings, device: torch.device, progress: Progress) -> Outcome:
    """All checks of the suite."""
    options, seeds = settings.diagonal, range(settings.replicates)
    gaussian = gaussian_sparse(options.n, options.d, options.nonzero).to(device)
    table = _table(options).to(device)
    start, table_start = (initial_state(p, options.initial_scale) for p in (gaussian, table))
    checks: list[Check] = []

    progress("identities")
    few = range(min(8, len(seeds)))
    for problem, at in ((gaussian, start), (table, table_start)):
        checks.append(claims.noisy_label_check(problem, at, few, seed_of(f"noisy labels {problem.name}")))
        checks += exact_law(problem, at, few)

    schedules = [Schedule(eta) for eta in sorted(options.step_sizes)]
    schedules += [
        Schedule(options.large_step, ((at, by),)) for at, by in zip(options.decay_at, options.decay_by, strict=True)
    ]
    progress(f"SGD on Gaussian data, {len(schedules)} schedules x {len(seeds)} seeds")
    ensemble = progress.kept("SGD, Gaussian", lambda: measure(gaussian, start, schedules, options.steps, seeds))
    table_schedules = [Schedule(eta) for eta in sorted(options.table_step_sizes)]
    progress(f"SGD on the table, {len(table_schedules)} schedules x {len(seeds)} seeds")
    table_ensemble = progress.kept(
        "SGD, table", lambda: measure(table, table_start, table_schedules, options.table_steps, seeds)
    )

    progress("α-decay and end points")
    constant = len(options.step_sizes)
    cells = cells_of(gaussian, start, schedules, ensemble, options.steps)
    for c, cell in enumerate(cells):
        checks += claims.alpha_checks(cell)
        last = c == constant - 1
        checks += claims.end_point_checks(
            cell, END_POINT_ERROR, END_POINT_ERROR_FROM_LEVEL if last else None, half=c < constant
        )
        if c < constant:
            checks += claims.end_point_progress(cell)
    # Known: a real table's residuals and inputs are far from homogeneous, and the level-δ laws miss by tens of percent.
    homogeneous = Verdict.AGREES if options.table else Verdict.DISAGREES
    table_cells = cells_of(table, table_start, table_schedules, table_ensemble, options.table_steps)
    for cell in table_cells:
        checks += claims.alpha_checks(cell, homogeneous)
        checks += claims.end_point_checks(cell, END_POINT_ERROR, None, half=True)
        checks += claims.end_point_progress(cell)
    final = {name: measure_of(ensemble.final) for name, measure_of in standard_measurements(gaussian).items()}
    falling = {"ℓ1": final["l1"], "ℓ0": final["l0"], "test loss": final["test loss"]}
    labels = [schedule.label for schedule in schedules]
    checks += claims.order_checks(gaussian, labels, falling, ensemble.finite)

    progress("GD, 5 schedules")
    checks += progress.kept("GD", lambda: gd_checks(options, device))
    progress(f"SDE with its own loss, {len(SDE_ETAS)} step sizes x {4 * settings.replicates} paths")
    checks += progress.kept("own loss", lambda: own_loss_checks(settings, device))
    progress(f"mean-field closure, {CLOSURE_STEPS[settings.size]} steps")
    checks += progress.kept("closure", lambda: closure_checks(settings, device))
    progress("loss surface")
    plane = surface(device)
    progress.close()
    measured = [ensemble_series("gaussian", ensemble, cells), ensemble_series("table", table_ensemble, table_cells)]
    return Outcome(checks, CLAIMS, xr.merge([*measured, plane]))


def _table(options: DiagonalSettings) -> Regression:
    if options.table:
        return read_table(options.table, options.target, options.table_rows)
    return diabetes_quadratic(options.table_rows)


def measure(
    problem: Regression, start: DiagonalState, schedules: Sequence[Schedule], steps: int, seeds: Sequence[int]
) -> Trajectory:
    """SGD with B = 1 on every schedule × seed, with everything the claims need measured along the way."""
    grid = widening_grid(steps)
    seldom = grid[::4]  # for what needs no more: the error that is stated, and a rival
    eta = stack_step_sizes(schedules, steps).T.to(problem.X.device)  # (steps, schedules)

    def noise_clock(at: Tensor) -> Tensor:
        """Σ η² of the steps that each record stands for, shape (T, schedules)."""
        return step_weights(at, steps).unsqueeze(1).to(eta) * eta[at].square()

    wanted = standard_measurements(problem)
    sparse = linear_grid(steps)

    last: list[tuple[DiagonalState, Tensor]] = []

    def residual2(state: DiagonalState) -> Tensor:
        """Shared by the probes of one step."""
        if not last or last[0][0] is not state:
            last[:] = [(state, (state.w @ problem.X.T - problem.y).square())]
        return last[0][1]

    def isotropic(state: DiagonalState) -> Tensor:
        power = ((state.u.square() + state.v.square()) * problem.mean_square).mean(-1) / 2
        return power * residual2(state).mean(-1) / 2

    probes = {name: Probe(function, sparse, at_once=True) for name, function in wanted.items()}
    probes |= {
        "level": Probe(lambda state: residual2(state).mean(-1) / 2, grid),
        "power": Probe(residual2, grid, noise_clock(grid)),
        "remainder": Probe(
            _Remainder(problem, residual2, eta[seldom]), seldom, step_weights(seldom, steps).unsqueeze(1).to(eta)
        ),
        "isotropic": Probe(isotropic, seldom, noise_clock(seldom)),
    }
    root = seed_of(f"diagonal {problem.name}")
    return sgd(problem, start, schedules, steps, seeds=seeds, probes=probes, root_seed=root)


class _Remainder:
    """What the SDE's small-step expansion drops a step, E[-ln|1 - g²|] - E[g²] at the visited state, shape (..., d).

    The mean over samples is taken over ``DRAWN`` random ones at each record: unbiased, and summed over thousands.
    """

    DRAWN = 2

    def __init__(self, problem: Regression, residual2: Callable[[DiagonalState], Tensor], eta: Tensor) -> None:
        self._squares, self._residual2 = problem.X.square(), residual2
        self._eta2 = eta.square()  # (T, schedules)
        self._rows = np.random.default_rng(seed_of("remainder")).integers(0, problem.n, (len(eta), self.DRAWN))
        self._record = 0

    def __call__(self, state: DiagonalState) -> Tensor:
        rows, eta2 = self._rows[self._record], self._eta2[self._record]
        self._record += 1
        g2 = (eta2.view(-1, 1, 1) * self._residual2(state)[..., rows]).unsqueeze(-1) * self._squares[rows]
        return (-(1 - g2).abs().log() - g2).mean(-2)


def cells_of(
    problem: Regression, start: DiagonalState, schedules: Sequence[Schedule], run: Trajectory, steps: int
) -> list[Cell]:
    """The schedules of a measured ensemble."""
    grid, final = run["level"].steps, run.final
    eta = stack_step_sizes(schedules, steps)[:, grid].T.to(problem.X)  # (T, schedules)
    weights = step_weights(grid, steps).to(problem.X.device)
    finite_step_law = alpha_decay.finite_step_change(
        problem, eta.unsqueeze(2), run["level"].values, weights, claims.PER_SAMPLE
    )
    return [
        Cell(
            problem, f"{problem.name}: {schedule.label}", start, final[c], run.finite[c], eta[:, c], weights,
            run["level"].values[:, c], run["power"].values[-1][c], run["remainder"].values[-1][c],
            run["isotropic"].values[-1][c], finite_step_law[c],
        )
        for c, schedule in enumerate(schedules)
    ]  # fmt: skip


def exact_law(problem: Regression, start: DiagonalState, seeds: Sequence[int]) -> list[Check]:
    """The exact discrete law on 200 steps of SGD and of GD."""
    steps = 200
    rng = np.random.default_rng(seed_of(f"exact law {problem.name}"))
    index = rng.integers(0, problem.n, (len(seeds), steps))
    probes = {"w": Probe(lambda state: state.w, torch.arange(steps))}
    checks = []
    for name, eta in (("SGD", 0.05), ("GD", 0.2)):
        if name == "SGD":
            run = sgd(
                problem, start, [Schedule(eta)], steps, seeds=seeds, indices=index, probes=probes, engine="literal"
            )
            rows = torch.from_numpy(index.T).to(problem.X.device)
            inputs = torch.nn.functional.one_hot(rows, problem.n).to(problem.X)
        else:
            run = gd(problem, start, [Schedule(eta)], steps, probes=probes, engine="literal")
            inputs = problem.X.new_full((steps, 1, problem.n), 1 / problem.n)
        change = (run.final.log_alpha - start.log_alpha)[0]
        visited = run["w"].values[:, 0]
        checks.append(claims.exact_law_check(problem, eta, visited, inputs, run, change, f"{name} η={eta:g}"))
    return checks


def gd_checks(options: DiagonalSettings, device: torch.device) -> list[Check]:
    """Gradient descent, which has no noise: below and beyond the edge of stability."""
    problem = gaussian_sparse(40, 100, 20).to(device)
    start = initial_state(problem, options.initial_scale)
    schedules = [Schedule(0.02), Schedule(2.0)]
    schedules += [Schedule(3.53, ((at, by),)) for at, by in ((0.1, 4.8), (0.3, 3.4), (0.5, 1.5))]
    run = gd(problem, start, schedules, min(options.steps, 20_001))
    checks = []
    for c, schedule in enumerate(schedules):
        parts = (run.final.a, run.final.b, run.final.a_exponent, run.final.b_exponent)
        final = DiagonalState(*(part[c] for part in parts))
        checks += claims.gd_checks(problem, start, final, run.finite[c], schedule)
    return checks


def own_loss_checks(settings: RunSettings, device: torch.device) -> list[Check]:
    """The SDE with its own loss against SGD."""
    options, checks = settings.diagonal, []
    small = gaussian_sparse(40, 60, 6).to(device)
    start = initial_state(small, options.initial_scale)
    paths, steps = 4 * settings.replicates, SDE_STEPS[settings.size]
    root = seed_of("diagonal ab initio")
    schedules = [Schedule(eta) for eta in SDE_ETAS]
    every = torch.arange(steps)
    mean_loss = {
        "loss": Probe(standard_measurements(small)["train loss"], every, small.X.new_full((steps,), 1 / steps))
    }
    real = sgd(small, start, schedules, steps, seeds=range(4 * paths), root_seed=root, probes=mean_loss)
    change = (real.final.log_alpha - start.log_alpha).mean(-1)
    quiet = gd(small, start, schedules, steps, probes=mean_loss)["loss"].values[-1]
    for c, eta in enumerate(SDE_ETAS):
        simulated = ab_initio.simulate(small, start, eta, steps, paths, root)
        rival = ab_initio.isotropic(small, start, eta, steps, settings.replicates, root) if c == 0 else None
        # Known: where the loss stabilises, the SDE's own loss stays below SGD's.
        expected = Verdict.AGREES if eta < 0.3 else Verdict.DISAGREES
        seen = ab_initio.Measured(change[c], real["loss"].values[-1][c], real.finite[c], float(quiet[c, 0]))
        checks += ab_initio.sde_checks(small, eta, seen, simulated, rival, expected)
    return checks


def closure_checks(settings: RunSettings, device: torch.device) -> list[Check]:
    """The mean-field closure against SGD."""
    options = settings.diagonal
    problem = gaussian_sparse(options.n, options.d, options.nonzero).to(device)
    start, steps = initial_state(problem, options.initial_scale), CLOSURE_STEPS[settings.size]
    schedules = [Schedule(eta) for eta in CLOSURE_ETAS]
    record = torch.arange(0, steps + 1, 10)
    closure = mean_field_closure(problem, start.log_a, start.log_b, stack_step_sizes(schedules, steps), record)
    second_half = torch.arange(steps // 2, steps + 1, 40)
    share = problem.X.new_full((len(second_half),), 1 / len(second_half))
    probes = {"level": Probe(standard_measurements(problem)["train loss"], second_half, share)}
    seeds = range(min(64 * settings.replicates, 4096))
    real = sgd(problem, start, schedules, steps, seeds=seeds, root_seed=seed_of("closure"), probes=probes)
    change = (real.final.log_alpha - start.log_alpha).mean(-1)
    return ab_initio.closure_checks(
        problem, CLOSURE_ETAS, closure, start, change, real["level"].values[-1], real.finite, CLOSURE_MISSES[steps]
    )
