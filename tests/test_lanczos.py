"""Lanczos and spectrum estimates: equal to dense decompositions, honest residuals, restart, warm start, bad input."""

import numpy as np
import pytest
import torch

from nets.curvature import Operator, gradient_covariance, hessian
from nets.images import digits
from nets.lanczos import eigenpairs
from nets.mlp import mlp
from nets.objective import SQUARED, Objective
from nets.spectrum import density, frobenius, random_signs, trace

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def operator_of(matrix):
    counter = []

    def product(v):
        counter.append(1)
        return matrix @ v

    return Operator("matrix", len(matrix), matrix.dtype, matrix.device, product), counter


def with_spectrum(values, seed=0):
    basis = torch.linalg.qr(randn(len(values), len(values), seed=seed)).Q
    return basis @ torch.diag(values.to(DOUBLE)) @ basis.T


MATRIX = with_spectrum(torch.cat([torch.tensor([9.0, 7.5, 7.4, -8.0, -3.0]), torch.linspace(-1, 1, 195)]))
DENSE = torch.linalg.eigvalsh(MATRIX).flip(0)
WANTED = {
    "largest": DENSE[:4],
    "smallest": DENSE.flip(0)[:4],
    "magnitude": DENSE[DENSE.abs().argsort(descending=True)][:4],
}


@pytest.mark.parametrize("which", WANTED)
@pytest.mark.parametrize(("k", "basis"), [(2, 6), (4, 40)])
def test_eigenpairs_are_the_dense_ones_with_and_without_restart(which, k, basis):
    operator, counter = operator_of(MATRIX)
    found = eigenpairs(operator, k, which, tolerance=1e-9, basis=basis, max_products=2000)
    assert found.converged
    assert torch.allclose(found.values, WANTED[which][:k], atol=1e-9)
    assert found.products == len(counter)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(k, dtype=DOUBLE), atol=1e-12)
    true = (MATRIX @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert torch.allclose(found.residuals, true, rtol=0, atol=1e-12)
    assert (true <= 1e-9 * 9).all()


def test_the_stop_rule_counts_residuals_and_says_when_it_gave_up():
    operator, _ = operator_of(MATRIX)
    loose, tight = (eigenpairs(operator, 3, tolerance=t) for t in (1e-2, 1e-8))
    assert loose.products < tight.products
    assert (loose.residuals <= 1e-2 * 9).all()
    assert not (loose.residuals <= 1e-8 * 9).all()
    short = eigenpairs(operator, 3, tolerance=1e-8, max_products=8)
    assert (short.products, short.converged) == (8, False)
    # Bauer-Fike: every value is within its residual of an eigenvalue.
    gaps = (DENSE.unsqueeze(0) - short.values.unsqueeze(1)).abs().amin(1)
    assert (gaps <= short.residuals + 1e-12).all()


def test_a_guard_pair_gives_what_a_start_lacks_the_time_to_appear():
    """Outliers as close as a classifier's: from few starts one is passed over, from fewer still with a guard."""
    outliers = torch.tensor([10.8, 10.1, 8.9, 8.6, 8.2, 7.8, 7.6, 6.7, 6.1, 4.8])
    matrix = with_spectrum(torch.cat([outliers, torch.linspace(0, 0.9, 290)]))
    operator, _ = operator_of(matrix)
    missed, products = [], []
    for guard in (0, 1, 4):
        runs = [eigenpairs(operator, 3, tolerance=1e-2, seed=seed, guard=guard) for seed in range(60)]
        assert all(run.converged and len(run.values) == len(run.residuals) == 3 for run in runs)
        missed.append(sum(bool(((run.values - outliers[:3]).abs() > 0.108).any()) for run in runs))
        products.append(sum(run.products for run in runs))
    assert missed[0] > missed[1] >= missed[2]
    assert products[0] < products[1] < products[2]


def test_a_warm_start_pays_where_the_operator_has_hardly_changed():
    operator, _ = operator_of(MATRIX)
    cold = eigenpairs(operator, 3, tolerance=1e-6)
    again = eigenpairs(operator, 3, start=cold.vectors, tolerance=1e-5)
    assert again.products <= 4
    moved = MATRIX + 1e-3 * with_spectrum(torch.linspace(-1, 1, 200), seed=3)
    warm, fresh = (eigenpairs(operator_of(moved)[0], 3, start=s, tolerance=1e-3) for s in (cold.vectors, None))
    assert warm.products <= 0.7 * fresh.products
    assert torch.allclose(warm.values, torch.linalg.eigvalsh(moved).flip(0)[:3], atol=1e-4)
    one = eigenpairs(operator, 3, start=cold.vectors[:, 0], tolerance=1e-6)  # a start that is an eigenvector already
    assert torch.allclose(one.values, cold.values, atol=1e-6)


@pytest.mark.parametrize("which", WANTED)
def test_what_still_are_eigenvectors_costs_one_product_each(which):
    operator, counter = operator_of(MATRIX)
    cold = eigenpairs(operator, 4, which, tolerance=1e-6)
    counter.clear()
    again = eigenpairs(operator, 4, which, start=cold.vectors, tolerance=2e-6)
    assert again.products == len(counter) == 4
    assert again.converged
    assert torch.allclose(again.values, WANTED[which], atol=1e-9)
    true = (MATRIX @ again.vectors - again.vectors * again.values).norm(dim=0)
    assert torch.allclose(again.residuals, true, rtol=0, atol=1e-12)
    more = eigenpairs(operator, 2, which, start=cold.vectors, tolerance=2e-6)
    assert (more.products, more.converged, more.vectors.shape) == (4, True, (200, 2))


def test_a_span_that_nearly_holds_them_is_completed():
    """Residuals of ±εw cancel in the sum: the test by one product passes, and what follows finds out."""
    values, V = torch.linalg.eigh(MATRIX)
    given = V[:, -2:] + 1e-3 * V[:, 50:51] * torch.tensor([1.0, -1.0]) / (values[50] - values[-2:])
    operator, counter = operator_of(MATRIX)
    found = eigenpairs(operator, 2, start=given, tolerance=1e-6)
    assert found.converged
    assert 2 < found.products == len(counter)
    assert torch.allclose(found.values, values.flip(0)[:2], atol=1e-9)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(2, dtype=DOUBLE), atol=1e-12)
    short = eigenpairs(operator, 2, start=given, tolerance=1e-6, max_products=2)
    assert (short.products, short.converged) == (2, False)


def test_far_from_eigenvectors_a_start_is_no_more_than_a_direction():
    given = torch.linalg.qr(randn(200, 3, seed=5)).Q
    operator, _ = operator_of(MATRIX)
    spans = eigenpairs(operator, 3, start=given, tolerance=1e-6)
    alone = eigenpairs(operator, 3, start=given.sum(1), tolerance=1e-6)
    assert spans.products == alone.products
    assert torch.allclose(spans.vectors.abs(), alone.vectors.abs(), atol=1e-6)


def test_multiple_eigenvalues_and_whole_spaces_are_found():
    operator, _ = operator_of(with_spectrum(torch.tensor([5.0, 5.0, 5.0, 1.0, 0.0, 0.0])))
    found = eigenpairs(operator, 6, tolerance=1e-10)
    assert found.converged
    assert torch.allclose(found.values, torch.tensor([5.0, 5, 5, 1, 0, 0], dtype=DOUBLE), atol=1e-10)
    zero, _ = operator_of(torch.zeros(5, 5, dtype=DOUBLE))
    assert torch.equal(eigenpairs(zero, 2).values, torch.zeros(2, dtype=DOUBLE))


def test_single_precision_keeps_its_dtype():
    found = eigenpairs(operator_of(MATRIX.float())[0], 3, tolerance=1e-4)
    assert found.vectors.dtype == torch.float32
    assert found.converged
    assert torch.allclose(found.values.double(), DENSE[:3], rtol=1e-4)


@pytest.fixture(scope="module")
def objective():
    data = digits(60)
    return Objective(mlp((64, 4, 10)), data.train_x, data.train_y, SQUARED)


def test_a_networks_top_and_bottom_are_those_of_its_dense_hessian(objective):
    H = hessian(objective, objective.net.theta)
    dense = torch.linalg.eigvalsh(H.dense())
    assert torch.allclose(eigenpairs(H, 5, tolerance=1e-8).values, dense.flip(0)[:5], atol=1e-9)
    assert torch.allclose(eigenpairs(H, 2, "smallest", tolerance=1e-6).values, dense[:2], atol=1e-7)
    C = gradient_covariance(objective, objective.net.theta)
    assert torch.allclose(
        eigenpairs(C, 3, tolerance=1e-8).values, torch.linalg.eigvalsh(C.dense()).flip(0)[:3], atol=1e-9
    )


def test_eigsh_of_curvlinops_finds_the_same(objective):
    curvlinops = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh

    net = objective.net.module
    loss = torch.nn.MSELoss(reduction="sum")
    targets = torch.nn.functional.one_hot(objective.labels, 10).double()
    theirs = curvlinops.HessianLinearOperator(
        net, loss, list(net.parameters()), [(objective.X, targets)], check_deterministic=False
    )
    values = eigsh(theirs.to_scipy(), k=5, which="LA", v0=np.ones(objective.p))[0][::-1] / (2 * objective.n)
    H = hessian(objective, objective.net.theta)
    assert torch.allclose(eigenpairs(H, 5, tolerance=1e-8).values, torch.from_numpy(values.copy()), atol=1e-9)


def test_trace_and_frobenius_norm_are_unbiased_at_the_stated_error():
    operator, _ = operator_of(MATRIX)
    exact = float(MATRIX.trace())
    plain = trace(operator, 64)
    assert abs(plain.value - exact) < 4 * plain.standard_error
    known = eigenpairs(operator, 5, "magnitude", tolerance=1e-3)
    sharp = trace(operator, 64, known)
    assert abs(sharp.value - exact) < 4 * sharp.standard_error
    assert sharp.standard_error < plain.standard_error / 1.5
    norm = frobenius(operator, 64)
    assert abs(norm.value - float(MATRIX.norm())) < 4 * norm.standard_error
    assert norm.standard_error < 0.1 * norm.value
    published = float(torch.stack([(MATRIX @ z).norm() for z in random_signs(operator, 64, 0)]).mean().sqrt())
    assert abs(published - norm.value) > 10 * norm.standard_error
    # Over many estimates the standard errors are right: z-scores have unit variance (χ² with 60 degrees, 4 sigma).
    z = [(t.value - exact) / t.standard_error for t in (trace(operator, 32, seed=seed) for seed in range(60))]
    assert abs(np.mean(np.square(z)) - 1) < 4 * (2 / 60) ** 0.5 + 0.1


def test_density_has_the_right_moments_and_mass():
    operator, _ = operator_of(MATRIX)
    found = density(operator, steps=20, starts=16)
    assert torch.allclose(found.weights.sum(1), torch.ones(16, dtype=DOUBLE))
    for power in (1, 2, 3):
        estimate, exact = found.mean_of(power), float((DENSE**power).mean())
        assert abs(estimate.value - exact) < 4 * estimate.standard_error
    signs = random_signs(operator, 16, 0)
    quadratic = torch.einsum("sp,pq,sq->s", signs, MATRIX @ MATRIX @ MATRIX, signs) / len(MATRIX)
    assert torch.allclose((found.weights * found.values**3).sum(1), quadratic)  # exact for each start
    grid = torch.linspace(-12, 12, 2001, dtype=DOUBLE)
    smooth = found.on(grid, 0.2)
    assert torch.trapezoid(smooth, grid) == pytest.approx(1, abs=1e-6)
    bulk = float(torch.trapezoid(smooth[grid.abs() < 2], grid[grid.abs() < 2]))
    assert bulk == pytest.approx(195 / 200, abs=0.03)
    exact = density(operator_of(with_spectrum(torch.tensor([2.0, 2.0, 1.0])))[0], steps=3)
    assert torch.isfinite(exact.values).all()


def nan_operator():
    return operator_of(MATRIX * torch.nan)[0]


BAD = {
    "choose between 1 and 200": lambda: eigenpairs(operator_of(MATRIX)[0], 0),
    "give at least 6": lambda: eigenpairs(operator_of(MATRIX)[0], 4, basis=5),
    "choose 0 or more": lambda: eigenpairs(operator_of(MATRIX)[0], 1, guard=-1),
    "choose a positive number": lambda: eigenpairs(operator_of(MATRIX)[0], 1, tolerance=0.0),
    "give finite columns": lambda: eigenpairs(operator_of(MATRIX)[0], 1, start=torch.ones(3, 1)),
    "before the run diverged": lambda: eigenpairs(nan_operator(), 1),
    "matrix gives NaN": lambda: density(nan_operator()),
    "2 or more": lambda: trace(operator_of(MATRIX)[0], 1),
    "choose 1 or more": lambda: density(operator_of(MATRIX)[0], 0),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_told_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence]()
    assert str(told.value).endswith(".")
