"""Each observable against its definition."""

import pytest
import torch

from theory import observables


@pytest.fixture
def uv(small):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, small.d, generator=generator, dtype=torch.float64)


def test_hessian_off_the_diagonal(small, uv):
    """Right for generic u ≠ v, where the cross block is not symmetric by itself."""
    d = small.d

    def loss(theta):
        return (small.X @ (theta[:d] * theta[d:]) - small.y).square().mean() / 2

    for u, v in zip(*uv, strict=True):
        expected = torch.func.hessian(loss)(torch.cat([u, v]))
        hessian = observables.diagonal_hessian(u, v, small.X, small.y)
        assert torch.allclose(hessian, expected, rtol=1e-11, atol=1e-12)
        top = torch.linalg.eigvalsh(expected)[-1]
        assert torch.isclose(observables.sharpness(u, v, small.X, small.y), top, rtol=1e-11)
    batched = observables.hessian_spectrum(*uv, small.X, small.y)
    assert batched.shape == (3, 2 * d)
    assert (batched.diff(dim=-1) <= 0).all()


def test_jacobian_rank_is_that_of_the_full_jacobian(small, uv):
    u, v = uv.clone()
    u[:, 5:], v[:, 5:] = 0, 0
    rank = observables.jacobian_rank(u, v, small.X)
    for k in range(3):
        jacobian = torch.cat([small.X * v[k], small.X * u[k]], 1)
        singular = torch.linalg.svdvals(jacobian)
        assert rank[k] == (singular > 1e-4 * singular[0]).sum() == 5


def test_norms(small):
    w = torch.tensor([[1.0, -2.0, 1e-60], [0.0, 0.0, 3.0]], dtype=torch.float64)
    assert observables.l1_norm(w).tolist() == [3, 3]
    assert observables.support_size(w).tolist() == [2, 1]
    assert observables.support_size(w, 1.5).tolist() == [1, 1]
    u, v = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 1.0])
    assert observables.balancedness(u, v) == 1
    X, y = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    assert observables.half_mse(w, X, y).tolist() == [2.0, 4.5]


@pytest.mark.parametrize("rows", [5, 11, 12, 300])
def test_half_mse_from_the_qr_factor_is_half_mse(rows):
    draws = torch.Generator().manual_seed(0)
    X, w = (torch.randn(shape, generator=draws, dtype=torch.float64) for shape in ((rows, 10), (4, 3, 10)))
    y = X @ w[0, 0] + torch.randn(rows, generator=draws, dtype=torch.float64)
    measure = observables.HalfMSE(X, y)
    assert torch.allclose(measure(w), observables.half_mse(w, X, y), rtol=1e-13)
    fitted = observables.HalfMSE(X, X @ w[0, 0])(w[0, 0] + 1e-9)  # a small loss keeps its digits
    assert torch.allclose(fitted, observables.half_mse(w[0, 0] + 1e-9, X, X @ w[0, 0]), rtol=1e-5)
