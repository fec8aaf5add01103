"""SGD on the diagonal network: equal engines, every option against a literal loop, streams, divergence."""

import numpy as np
import pytest
import torch

from nets.diagonal import gd, initial_state, sgd, standard_measurements, valley_projection
from nets.sampling import BatchStream
from nets.update import SAM, Update
from theory.minibatch import Minibatch
from theory.observables import half_mse
from theory.problem import gaussian_sparse
from theory.schedule import Schedule
from theory.trajectory import Probe


def literal(problem, u, v, eta, index, update=Update()):  # noqa: B008
    """The recursion as the papers write it, one numpy step at a time."""
    X, y = problem.X.numpy(), problem.y.numpy()
    mean_u, mean_v = u, v

    def gradient(u, v, rows):
        r = X[rows] @ (u * v) - y[rows]
        pull = X[rows].T @ r / len(rows)
        return pull * v, pull * u

    for k, rows in enumerate(index):
        if update.sam is None:
            gu, gv = gradient(u, v, rows)
        elif not update.sam.per_sample:
            gu, gv = gradient(u, v, rows)
            gu, gv = gradient(u + update.sam.radius * gu, v + update.sam.radius * gv, rows)
        else:
            gu, gv = 0.0, 0.0
            for i in rows:
                r = X[i] @ (u * v) - y[i]
                up, vp = u + 2 * update.sam.radius * r * X[i] * v, v + 2 * update.sam.radius * r * X[i] * u
                rp = X[i] @ (up * vp) - y[i]
                if update.sam.loss_derivative_only:
                    up, vp = u, v
                gu, gv = gu + rp * vp * X[i] / len(rows), gv + rp * up * X[i] / len(rows)
        if update.normalized:
            gu, gv = gu / np.linalg.norm(gu), gv / np.linalg.norm(gv)
        step, rho = eta[k], update.balance_shrinkage
        new_u = u - step * gu - update.weight_decay * u - rho * u * (2 * (abs(u) > abs(v)) - 1)
        new_v = v - step * gv - update.weight_decay * v - rho * v * (2 * (abs(v) > abs(u)) - 1)
        u, v, w = new_u, new_v, update.averaging
        mean_u, mean_v = w * mean_u + (1 - w) * u, w * mean_v + (1 - w) * v
    return mean_u, mean_v


OPTIONS = {
    "plain": Update(),
    "weight decay": Update(weight_decay=1e-3),
    "averaging": Update(averaging=0.9),
    "balance": Update(balance_shrinkage=1e-3),
    "normalised": Update(normalized=True),
    "n-SAM": Update(sam=SAM(0.1)),
    "1-SAM": Update(sam=SAM(0.1, per_sample=True)),
    "1-SAM, loss derivative": Update(sam=SAM(0.1, per_sample=True, loss_derivative_only=True)),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [1, 3])
def test_every_option_against_the_literal_loop(small, name, size):
    update, steps = OPTIONS[name], 60
    index = np.random.default_rng(0).integers(0, small.n, (1, steps, size))
    schedule = Schedule(0.05, ((0.5, 2.0),))
    start = initial_state(small, 0.3, 0.1)
    expected = literal(
        small, start.u.numpy(), start.v.numpy(), schedule.step_sizes(steps).numpy(), index[0], update
    )  # fmt: skip
    engines = ["literal"] + (["compiled", "multiplicative"] if update.multiplicative else [])
    for engine in engines:
        final = sgd(small, start, [schedule], steps, seeds=[0], indices=index, update=update, engine=engine).final
        assert np.allclose(final.u[0, 0], expected[0], rtol=1e-11, atol=1e-13), engine
        assert np.allclose(final.v[0, 0], expected[1], rtol=1e-11, atol=1e-13), engine
    if name != "plain":
        plain = sgd(small, start, [schedule], steps, seeds=[0], indices=index).final
        assert not np.allclose(plain.u[0, 0], expected[0], rtol=1e-6)


def test_full_batch_options(small):
    """GD with every option: the paper's code offers them there."""
    everything = [np.arange(small.n)] * 40
    start = initial_state(small, 0.3, 0.1)
    for name, update in OPTIONS.items():
        expected = literal(small, start.u.numpy(), start.v.numpy(), [0.1] * 40, everything, update)
        final = gd(small, start, [Schedule(0.1)], 40, update=update).final
        assert np.allclose(final.u[0, 0], expected[0], rtol=1e-11, atol=1e-13), name


def test_engines_agree_on_batches_of_schedules_and_seeds(small):
    schedules = [Schedule(0.1), Schedule(0.2, ((0.5, 4.0),))]
    update = Update(label_noise=0.2, weight_decay=1e-4)
    for batch in (Minibatch(), Minibatch(3), Minibatch(3, replacement=False)):
        finals = [
            sgd(small, initial_state(small), schedules, 300, seeds=range(5), batch=batch, update=update, engine=e).final
            for e in ("compiled", "multiplicative", "literal")
        ]
        assert torch.allclose(finals[0].w, finals[1].w, rtol=1e-9, atol=1e-12)
        assert torch.allclose(finals[0].w, finals[2].w, rtol=1e-9, atol=1e-12)
        assert finals[0].w.shape == (2, 5, small.d)
        assert not torch.allclose(finals[0].w[0], finals[0].w[1], rtol=1e-3)


def test_single_precision_follows_alpha_too(small):
    problem = gaussian_sparse(20, 40, 4).to(dtype=torch.float32)
    index = np.random.default_rng(0).integers(0, 20, (2, 4000))
    single = sgd(problem, initial_state(problem), [Schedule(0.9)], 4000, seeds=[0, 1], indices=index)
    assert single.final.a.dtype == torch.float32
    alive = single.finite[0]
    if alive.any():
        assert torch.isfinite(single.final.log_alpha[0, alive]).all()
    double = gaussian_sparse(20, 40, 4)
    short = [
        sgd(p, initial_state(p), [Schedule(0.2)], 200, seeds=[0, 1], indices=index[:, :200]).final
        for p in (problem, double)
    ]
    assert torch.allclose(short[0].log_alpha.double(), short[1].log_alpha, atol=1e-3)


def test_seeds_do_not_depend_on_their_number_nor_on_records(small):
    arguments = (small, initial_state(small), [Schedule(0.1)], 2500)
    many = sgd(*arguments, seeds=range(6)).final
    few = sgd(*arguments, seeds=[4, 2]).final
    assert torch.equal(many.w[:, [4, 2]], few.w)
    probes = {"w": Probe(lambda s: s.w, torch.tensor([0, 3, 1023, 1024, 1500, 2500]))}
    recorded = sgd(*arguments, seeds=range(6), probes=probes)
    assert torch.equal(recorded.final.w, many.w)
    assert torch.equal(recorded["w"].values[-1], many.w)
    assert not torch.equal(sgd(*arguments, seeds=range(6), root_seed=1).final.w, many.w)


def test_batches_are_drawn_as_said(small):
    with_replacement = BatchStream(small.n, Minibatch(4), [0, 1], 0).block(5000)
    without = BatchStream(small.n, Minibatch(4, replacement=False), [0, 1], 0).block(5000)
    for draws in (with_replacement, without):
        counts = np.bincount(draws.ravel(), minlength=small.n)
        assert (np.abs(counts - 5000) < 5 * np.sqrt(5000)).all()
    assert all(len(set(batch)) == 4 for batch in without.reshape(-1, 4))
    assert any(len(set(batch)) < 4 for batch in with_replacement.reshape(-1, 4))
    cut = BatchStream(small.n, Minibatch(4), [0, 1], 0)
    assert (np.concatenate([cut.block(7), cut.block(4993)], 1) == with_replacement).all()


def test_explicit_label_noise_has_its_variance(small):
    """With all residuals zero the step is the noise alone: ln α falls by ½·2·η²σ²x² per step on average."""
    start = initial_state(small, 0.5, 0.0)
    sigma, eta = 0.3, 1e-3
    final = sgd(small, start, [Schedule(eta)], 1, seeds=range(4000), indices=np.zeros((4000, 1), int),
                update=Update(label_noise=sigma)).final  # fmt: skip
    r = small.X[0] @ start.w - small.y[0]
    step = -(final.z - start.z)[0] / (eta * small.X[0])  # r - σξ, to third order
    assert (step.mean(0) - r).abs().max() < 5 * sigma / 4000**0.5
    assert (step.std(0) / sigma - 1).abs().max() < 0.06


def test_divergence_is_dated_frozen_and_counted():
    problem = gaussian_sparse(10, 20, 3)
    probes = {k: Probe(f, torch.arange(0, 201, 50)) for k, f in standard_measurements(problem).items()}
    runs = [
        sgd(problem, initial_state(problem, 0.5), [Schedule(0.01), Schedule(5.0)], 200, seeds=range(3), probes=probes,
            engine=engine)
        for engine in ("compiled", "multiplicative")
    ]  # fmt: skip
    for run in runs:
        assert run.finite[0].all()
        assert not run.finite[1].any()
        assert (run.first_bad_step[1] < 200).all()
        assert torch.isnan(run["train loss"].values[-1, 1]).all()
        assert torch.isfinite(run["train loss"].values[:, 0]).all()
        assert torch.isfinite(run.final.a).all()
    assert torch.equal(runs[0].first_bad_step, runs[1].first_bad_step)


def test_valley_projection_goes_down_without_changing_far(small):
    state = sgd(small, initial_state(small), [Schedule(0.2)], 20, seeds=range(3)).final
    below = valley_projection(small, state, steps=500)
    assert below.w.shape == state.w.shape
    assert (half_mse(below.w, small.X, small.y) < 0.1 * half_mse(state.w, small.X, small.y)).all()
    one = valley_projection(small, initial_state(small), step_size=0.1, steps=7)
    assert torch.equal(one.w, gd(small, initial_state(small), [Schedule(0.1)], 7).final.w[0, 0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"seeds": []}, "at least one seed"),
        ({"schedules": []}, "at least one"),
        ({"indices": np.zeros((1, 3), int)}, "do not fit"),
        ({"indices": np.full((1, 5), 99)}, "integers from 0 to 7"),
        ({"batch": Minibatch(9, replacement=False)}, "at most 8"),
        ({"update": Update(normalized=True), "engine": "compiled"}, "literal engine"),
    ],
)
def test_mistakes_get_one_sentence(small, arguments, sentence):
    call = {"schedules": [Schedule(0.1)], "seeds": [0], **arguments}
    with pytest.raises(ValueError, match=sentence):
        sgd(small, initial_state(small), call.pop("schedules"), 5, **call)


def test_bad_options():
    for bad in ({"weight_decay": -1.0}, {"label_noise": float("nan")}, {"averaging": 1.0}):
        with pytest.raises(ValueError, match="not usable"):
            Update(**bad)
    with pytest.raises(ValueError, match="not usable"):
        SAM(-0.1)


@pytest.mark.parametrize("engine", ["compiled", "multiplicative", "literal"])
def test_records_measured_together_are_those_measured_one_by_one(small, engine, monkeypatch):
    """Standard quantities on a dense grid, at once (in pieces that do and do not end with a block) and step by step."""
    steps, schedules = 1100, [Schedule(0.1), Schedule(5.0)]
    grid = torch.tensor([0, 1, 2, 63, 64, 500, 1023, 1024, 1099, 1100])
    weights = torch.linspace(0, 1, len(grid), dtype=torch.float64).unsqueeze(1).expand(-1, 2)
    measure = standard_measurements(small)
    seen = []
    for at_once, room in ((False, 2**21), (True, 2**21), (True, 2 * 24 * 6 * small.d), (True, 1)):
        monkeypatch.setattr("nets.diagonal.SEEN_BYTES", room)
        probes = {name: Probe(function, grid, at_once=at_once) for name, function in measure.items()}
        probes["sum"] = Probe(measure["train loss"], grid, weights, at_once=at_once)
        probes["some"] = Probe(measure["l1"], grid[1::3], at_once=at_once)
        seen.append(sgd(small, initial_state(small), schedules, steps, seeds=range(3), probes=probes, engine=engine))
    assert seen[0].finite[0].all()
    assert not seen[0].finite[1].any()
    for run in seen[1:]:
        for name, series in run.series.items():
            assert torch.equal(series.steps, seen[0][name].steps)
            assert torch.allclose(series.values, seen[0][name].values, rtol=1e-11, equal_nan=True), name


def test_states_seen_on_the_way_are_exact_and_far_below_the_float_range():
    """α beyond 1e-300, weight decay: the compiled loop's records against final states of shorter runs."""
    problem = gaussian_sparse(10, 30, 3)
    start = initial_state(problem, 1e-140, 0.0)
    at = torch.tensor([0, 65, 400, 1025])
    for decay in (0.0, 1e-3):
        options = {"seeds": range(2), "update": Update(weight_decay=decay)}
        probes = {"ln α": Probe(lambda s: s.log_alpha, at), "mean": Probe(lambda s: s.mean_log_alpha, at, at_once=True)}
        run = sgd(problem, start, [Schedule(0.05)], 1100, probes=probes, **options)
        for row, step in enumerate(at.tolist()):
            final = sgd(problem, start, [Schedule(0.05)], step, **options).final
            assert torch.equal(run["ln α"].values[row], final.log_alpha)
            assert torch.allclose(run["mean"].values[row], final.log_alpha.mean(-1), rtol=1e-14)
