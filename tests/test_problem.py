"""Data: the paper's draws to the bit, a real table, and one sentence for what cannot be used."""

import numpy as np
import pytest
import torch

from theory.problem import Regression, diabetes_quadratic, gaussian_sparse, read_table, standardized_split


def test_gaussian_sparse_replays_the_published_draws():
    rng = np.random.RandomState(0)
    X = rng.multivariate_normal(np.zeros(6), np.eye(6), 4)
    X_test = rng.multivariate_normal(np.zeros(6), np.eye(6), 5)
    truth = rng.randn(6)
    truth[2:] = 0
    truth = np.abs(truth) / np.linalg.norm(truth)
    problem = gaussian_sparse(4, 6, 2, n_test=5)
    assert (problem.X.numpy() == X).all()
    assert (problem.X_test.numpy() == X_test).all()
    assert (problem.y.numpy() == X @ truth).all()
    assert problem.truth is not None
    assert (problem.truth.numpy() == truth).all()


def test_published_data_constants():
    problem = gaussian_sparse(80, 200, 20)
    eigenvalues = torch.linalg.eigvalsh(problem.X.T @ problem.X / 80)
    norms = problem.X.square().sum(1)
    assert eigenvalues[-1].item() == pytest.approx(6.42, abs=5e-3)
    assert norms.mean().item() == pytest.approx(195.9, abs=0.05)
    assert norms.max().item() == pytest.approx(244.6, abs=0.05)


def test_diabetes_table():
    problem = diabetes_quadratic(20)
    assert (problem.n, problem.d, len(problem.X_test)) == (20, 64, 422)
    everything = torch.cat([problem.X, problem.X_test])
    assert torch.allclose(everything.mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(everything.square().mean(0), torch.ones(64, dtype=torch.float64), atol=1e-12)
    assert torch.linalg.matrix_rank(everything) == 64  # the square of the binary column would repeat it
    assert torch.linalg.matrix_rank(problem.X) == 20


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"X": torch.zeros(3)}, "2-D table"),
        ({"y": torch.zeros(2)}, "one target per row"),
        ({"X_test": torch.zeros(1, 3)}, "same columns"),
        ({"y": torch.tensor([0.0, float("nan"), 1.0])}, "NaN"),
    ],
)
def test_bad_data_is_refused(change, sentence):
    good = {"X": torch.zeros(3, 2), "y": torch.zeros(3), "X_test": torch.zeros(1, 2), "y_test": torch.zeros(1)}
    Regression(**good)
    with pytest.raises(ValueError, match=sentence):
        Regression(**{**good, **change})


@pytest.mark.parametrize(("n", "d", "nonzero"), [(0, 3, 1), (3, 0, 1), (3, 3, 4), (3, 3, 0)])
def test_sizes_that_do_not_fit(n, d, nonzero):
    with pytest.raises(ValueError, match="do not fit"):
        gaussian_sparse(n, d, nonzero)


def test_read_table(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("a,b,y\n" + "\n".join(f"{i},{i * i},{3 * i + 1}" for i in range(10)))
    problem = read_table(path, "y", 4)
    assert (problem.n, problem.d, len(problem.X_test), problem.name) == (4, 2, 6, "mine")
    with pytest.raises(ValueError, match="no column 'z'"):
        read_table(path, "z", 4)
    with pytest.raises(ValueError, match="choose between 1 and 9"):
        read_table(path, "y", 10)
    with pytest.raises(ValueError, match="no table at"):
        read_table(tmp_path / "none.csv", "y", 4)
    path.write_text("a,b,y\n1,,2\n2,3,4\n5,6,7\n")
    with pytest.raises(ValueError, match="NaN"):
        read_table(path, "y", 1)
    path.write_text("a,b,y\nx,1,2\ny,3,4\n")
    with pytest.raises(ValueError, match=r"columns a .* are not numbers"):
        read_table(path, "y", 1)


def test_constant_column_is_named():
    with pytest.raises(ValueError, match=r"column 1 .* never changes"):
        standardized_split(np.array([[1.0, 2.0], [3.0, 2.0], [4.0, 2.0]]), np.arange(3.0), 1, 0, "t")
