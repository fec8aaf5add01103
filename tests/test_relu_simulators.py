"""The fused loop of ReLU networks: equal to the generic integrator on equal increments, whatever the batch."""

import numpy as np
import pytest
import torch

from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from simulators.relu import integrate_relu
from theory.minibatch import Minibatch
from theory.problem import Regression
from theory.relu import Isotropic, MeasuredLevel, ReluSDE
from theory.relu_init import gaussian
from theory.relu_network import ReluNetwork
from theory.schedule import Schedule, StepClock
from theory.sde import ExactCovariance, LabelNoise
from theory.trajectory import Probe

NETWORKS = [ReluNetwork((2, 19, 1)), ReluNetwork((1, 9, 1), (True, False)), ReluNetwork((3, 5, 12, 1), (True,) * 3)]
SAMPLES = 11  # eight and some over, as of units
ETA = Schedule(0.15, ((0.5, 3.0),)).step_sizes(20)
DT, CLOCK = (ETA / 2).repeat_interleave(2), StepClock(ETA)
PATHS = 19  # two groups, the second not full


def problem_of(network, labels=False):
    generator = np.random.default_rng(0)
    X = torch.from_numpy(generator.standard_normal((SAMPLES, network.widths[0])))
    y = torch.from_numpy(generator.standard_normal(SAMPLES))
    return Regression(X, y.sign() if labels else y, X, y)


def start_of(network, paths=PATHS):
    return gaussian(network, (0.5,) * network.depth, range(paths))


def measured(paths=PATHS):
    values = 0.2 * torch.from_numpy(np.random.default_rng(2).random((4, paths)))
    return MeasuredLevel(torch.tensor([0, 3, 9, 14]), values, ETA)


COVARIANCES = {
    "own loss": LabelNoise(CLOCK),
    "a number": LabelNoise(CLOCK, 0.1, Minibatch(2)),
    "measured level": LabelNoise(CLOCK, measured()),
    "exact covariance": ExactCovariance(CLOCK, Minibatch(3, replacement=False)),
    "isotropic": Isotropic(CLOCK),
    "isotropic at a measured level": Isotropic(CLOCK, measured()),
}


def increments(network, covariance, problem, paths=PATHS, refine=1, dtype=torch.float64):
    channels = network.size if isinstance(covariance, Isotropic) else problem.n
    return BrownianIncrements(5, "relu", paths, channels, refine, dtype)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: str(network.widths))
@pytest.mark.parametrize("name", COVARIANCES)
def test_fused_loop_is_the_generic_one(network, name, loss):
    covariance, problem = COVARIANCES[name], problem_of(network, loss == "logistic")
    y0, probes = start_of(network), {"theta": Probe(lambda theta: theta, torch.tensor([0, 3, 17, 40]))}
    fast = integrate_relu(
        network, problem, covariance, y0, DT, 40, increments(network, covariance, problem), probes, loss=loss
    )
    slow = integrate(
        ReluSDE(network, problem, covariance, loss), y0, DT, 40, increments(network, covariance, problem), probes
    )
    moved = (slow.final - y0).norm()
    assert moved > 0.1
    torch.testing.assert_close(fast["theta"].values, slow["theta"].values, rtol=0, atol=1e-11)
    torch.testing.assert_close(fast.final, slow.final, rtol=0, atol=1e-11)
    assert fast.finite.all()


@pytest.mark.parametrize("name", COVARIANCES)
def test_single_precision_differs_by_rounding(name):
    network, covariance = NETWORKS[2], COVARIANCES[name]
    problem, y0, finals = problem_of(network), start_of(network), []
    for dtype in (torch.float64, torch.float32):
        noise = increments(network, covariance, problem, dtype=dtype)
        run = integrate_relu(network, problem, covariance, y0.to(dtype), DT, 40, noise)
        assert run.final.dtype == dtype
        finals.append(run.final.double())
    assert (finals[0] - y0).norm() > 0.1
    torch.testing.assert_close(finals[1], finals[0], rtol=0, atol=2e-5)


def test_a_path_does_not_depend_on_how_many_run_beside_it():
    network = NETWORKS[2]
    problem, covariance = problem_of(network), ExactCovariance(CLOCK)
    finals = []
    for paths in (PATHS, 5, 1):
        noise = BrownianIncrements(5, "relu", PATHS, problem.n)

        class Prefix:
            def __init__(self, paths, noise):
                self.paths, self.channels, self.refine, self._noise = paths, noise.channels, 2, noise

            def __call__(self, step):
                return self._noise(step)[: self.paths]

        finals.append(
            integrate_relu(network, problem, covariance, start_of(network, paths), DT, 40, Prefix(paths, noise)).final
        )
    assert torch.equal(finals[0][:5], finals[1])
    assert torch.equal(finals[0][:1], finals[2])


def test_a_run_resumes_bit_for_bit_and_refined_increments_are_used():
    network = NETWORKS[1]
    problem = problem_of(network)
    whole, half = (increments(network, CLOCK, problem, refine=refine) for refine in (2, 1))
    arguments = (network, problem, LabelNoise(CLOCK), start_of(network), DT, 40)
    run = integrate_relu(*arguments, whole)
    first = integrate_relu(network, problem, LabelNoise(CLOCK), start_of(network), DT[:13], 13, whole)
    resumed = integrate_relu(network, problem, LabelNoise(CLOCK), first.final, DT, 40, whole, first_step=13)
    assert torch.equal(run.final, resumed.final)
    slow = integrate(ReluSDE(network, problem, LabelNoise(CLOCK)), start_of(network), DT, 40, whole)
    torch.testing.assert_close(run.final, slow.final, rtol=0, atol=1e-11)
    assert not torch.equal(run.final, integrate_relu(*arguments, half).final)


def test_diverged_paths_keep_their_last_state_and_their_step():
    network = NETWORKS[0]
    problem, covariance = problem_of(network), LabelNoise(8.0)
    y0 = start_of(network)
    y0[::2] *= 0.01
    fast = integrate_relu(network, problem, covariance, y0, 8.0, 30, increments(network, covariance, problem))
    slow = integrate(ReluSDE(network, problem, covariance), y0, 8.0, 30, increments(network, covariance, problem))
    assert int((~fast.finite).sum()) > 0
    assert torch.equal(fast.first_bad_step, slow.first_bad_step)
    assert torch.isfinite(fast.final).all()


def test_without_noise_it_is_gradient_descent():
    network = NETWORKS[2]
    problem, y0 = problem_of(network), start_of(network, 3)
    noise = increments(network, CLOCK, problem, 3)
    final = integrate_relu(network, problem, LabelNoise(0.1, 0.0), y0, 0.1, 25, noise).final
    for _ in range(25):
        loss = torch.func.vmap(torch.func.grad(lambda at: (network(at, problem.X) - problem.y).square().mean() / 2))
        y0 = y0 - 0.1 * loss(y0)
    torch.testing.assert_close(final, y0, rtol=0, atol=1e-12)


def test_bad_input_is_told_what_to_do():
    network = NETWORKS[0]
    problem, y0 = problem_of(network), start_of(network)
    noise = increments(network, CLOCK, problem)
    with pytest.raises(ValueError, match="give a finite one"):
        integrate_relu(network, problem, LabelNoise(0.1), y0 / 0, 0.1, 5, noise)
    with pytest.raises(ValueError, match="channels: give them the same"):
        integrate_relu(network, problem, Isotropic(0.1), y0, 0.1, 5, noise)
    with pytest.raises(ValueError, match="float32 on the CPU"):
        integrate_relu(network, problem, LabelNoise(0.1), y0.half(), 0.1, 5, noise)
