"""½ η tr[C(2I - ηH)^{-1}] without matrices: against dense algebra, Lyapunov's equation and its own standard error."""

import numpy as np
import pytest
import torch

from theory.bouncing import LinearSGD, linear_covariance
from theory.excess_loss import TopDirections, excess_loss, noise_probes
from theory.streams import named_generator

DOUBLE = torch.float64
LAW = LinearSGD(0.4)


def problem(p=12, n=30, top=4.6):
    rng = np.random.default_rng(0)
    basis = torch.from_numpy(np.linalg.qr(rng.standard_normal((p, p)))[0])
    values = torch.linspace(-0.2, 1.0, p, dtype=DOUBLE)
    values[-3:] = torch.tensor([top - 2, top - 1, top], dtype=DOUBLE)
    H = basis @ torch.diag(values) @ basis.T
    gradients = torch.from_numpy(rng.standard_normal((n, p))) @ (torch.eye(p, dtype=DOUBLE) + H)
    centred = gradients - gradients.mean(0)
    return H, values, basis, gradients, centred.T @ centred / n


def exhaustive(gradients):
    """The centred per-sample gradients as columns: their mean vvᵀ is C."""
    return (gradients - gradients.mean(0)).T


@pytest.mark.parametrize("law", [LAW, LinearSGD(0.3, 0.8)])
def test_all_sample_gradients_give_the_exact_trace(law):
    H, values, basis, gradients, C = problem()
    mu, s = law.momentum, law.step_size / (1 + law.momentum)
    expected = law.step_size / (2 * (1 - mu)) * torch.trace(C @ torch.linalg.inv(2 * torch.eye(12) - s * H))
    found = excess_loss(law, lambda v: H @ v, exhaustive(gradients), tolerance=1e-10)
    assert found.value == pytest.approx(float(expected), rel=1e-9)
    assert found.residual < 1e-10
    # The same from the spectrum, and, where all directions are stable, from the covariance of the iterates.
    along = torch.diagonal(basis.T @ C @ basis)
    assert found.value == pytest.approx(float(law.excess_loss(values, along)), rel=1e-9)


def test_it_is_half_the_trace_of_hessian_times_stationary_covariance():
    H, _, _, gradients, C = problem()
    raised = H + 0.3 * torch.eye(12)  # every direction stable
    found = excess_loss(LinearSGD(0.4, 0.5), lambda v: raised @ v, exhaustive(gradients), tolerance=1e-10)
    covariance = linear_covariance(raised, C, LinearSGD(0.4, 0.5))
    assert found.value == pytest.approx(float(torch.trace(raised @ covariance)) / 2, rel=1e-9)


def test_top_directions_and_the_trace_change_the_work_and_not_the_value():
    H, values, basis, gradients, C = problem()
    v = exhaustive(gradients)
    plain = excess_loss(LAW, lambda v: H @ v, v, tolerance=1e-9)
    along = torch.diagonal(basis.T @ C @ basis)
    top = TopDirections(values[-3:], basis[:, -3:], along[-3:])
    total = float(torch.trace(C))
    for options in ({"top": top}, {"total_noise": total}, {"top": top, "total_noise": total}):
        found = excess_loss(LAW, lambda v: H @ v, v, tolerance=1e-9, **options)
        assert found.value == pytest.approx(plain.value, rel=1e-8)
        assert found.products <= plain.products
    assert found.top == pytest.approx(float(LAW.excess_loss(values[-3:], along[-3:])), rel=1e-12)
    assert found.top + found.rest == pytest.approx(found.value)


def test_the_error_of_the_trace_is_of_second_order_in_the_tolerance():
    H, _, _, gradients, _ = problem()
    exact = excess_loss(LAW, lambda v: H @ v, exhaustive(gradients), tolerance=1e-12).value
    loose = excess_loss(LAW, lambda v: H @ v, exhaustive(gradients), tolerance=1e-3).value
    assert abs(loose / exact - 1) < 1e-5


def test_random_probes_have_the_covariance_and_a_true_standard_error():
    H, values, basis, gradients, C = problem()
    probes = noise_probes(lambda w: gradients.T @ w, 30, 20_000, named_generator(0, "probes"), H)
    assert torch.allclose(probes @ probes.T / 20_000, C, atol=5 * float(C.diagonal().max()) / 20_000**0.5)
    exact = excess_loss(LAW, lambda v: H @ v, exhaustive(gradients), tolerance=1e-8).value
    along = torch.diagonal(basis.T @ C @ basis)
    top = TopDirections(values[-3:], basis[:, -3:], along[-3:])
    errors = []
    for options in ({}, {"top": top, "total_noise": float(torch.trace(C))}):
        blocks = [excess_loss(LAW, lambda v: H @ v, part, **options) for part in probes.split(20, 1)]
        gaps = np.array([block.value - exact for block in blocks])
        assert abs(gaps.mean()) < 4 * gaps.std() / len(gaps) ** 0.5
        stated = np.sqrt(np.mean([block.standard_error**2 for block in blocks]))
        assert gaps.std() == pytest.approx(stated, rel=0.15)
        errors.append(stated)
    assert errors[1] < errors[0] / 10  # what exact directions and the known trace are for


def test_single_precision_is_enough_for_the_default_tolerance():
    H, _, _, gradients, _ = problem()
    exact = excess_loss(LAW, lambda v: H @ v, exhaustive(gradients), tolerance=1e-8).value
    single = excess_loss(LAW, lambda v: H.float() @ v, exhaustive(gradients).float())
    assert single.value == pytest.approx(exact, rel=1e-5)


def test_instability_and_bad_input_are_said():
    H, values, basis, gradients, C = problem(top=5.2)  # ηλ = 2.08
    with pytest.raises(ValueError, match="beyond 2 there is no stationary level"):
        excess_loss(LAW, lambda v: H @ v, exhaustive(gradients), tolerance=1e-9)
    along = torch.diagonal(basis.T @ C @ basis)
    with pytest.raises(ValueError, match=r"= 2\.08"):
        excess_loss(
            LAW, lambda v: H @ v, exhaustive(gradients), top=TopDirections(values[-1:], basis[:, -1:], along[-1:])
        )
    assert excess_loss(LinearSGD(0.4, 0.1), lambda v: H @ v, exhaustive(gradients)).value > 0  # momentum stabilises
    with pytest.raises(ValueError, match="finite columns"):
        excess_loss(LAW, lambda v: H @ v, gradients[0])
    with pytest.raises(ValueError, match="do not fit 12 parameters"):
        excess_loss(LAW, lambda v: H @ v, exhaustive(gradients), top=TopDirections(values, basis[:, -1:], along))
    with pytest.raises(ValueError, match="not finite"):
        excess_loss(LAW, lambda v: v / 0, exhaustive(gradients))
    nearly = torch.diag(torch.cat([torch.linspace(-300, 4.9, 11), torch.tensor([4.9999999])]).double())
    with pytest.raises(ValueError, match="close to instability"):
        excess_loss(LAW, lambda v: nearly @ v, exhaustive(gradients), tolerance=1e-12, max_iterations=4)
