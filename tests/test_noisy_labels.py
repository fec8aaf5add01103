"""Prop. 1: SGD is gradient descent on noisy labels."""

import numpy as np
import torch

from nets.diagonal import gd, initial_state, sgd
from theory.noisy_labels import label_noise, label_noise_covariance
from theory.problem import Regression
from theory.schedule import Schedule


def test_moments_by_enumeration(small):
    r = torch.linspace(-1, 2, small.n, dtype=torch.float64)
    xi = torch.stack([label_noise(r, torch.tensor(i)) for i in range(small.n)])
    covariance = xi.T @ xi / small.n
    assert torch.allclose(xi.mean(0), torch.zeros_like(r), atol=1e-14)
    assert torch.allclose(covariance, label_noise_covariance(r), atol=1e-12)
    loss = r.square().mean() / 2
    assert torch.allclose(covariance.trace(), 2 * small.n * (small.n - 1) * loss, rtol=1e-13)


def test_step_identity_on_the_network(small):
    start = initial_state(small, 0.4, 0.2)
    for i in range(small.n):
        stepped = sgd(small, start, [Schedule(0.1)], 1, seeds=[0], indices=np.array([[i]])).final
        xi = label_noise(small.X @ start.w - small.y, torch.tensor(i))
        noisy = Regression(small.X, small.y + xi, small.X_test, small.y_test)
        other = gd(noisy, start, [Schedule(0.1)], 1).final
        assert torch.allclose(stepped.u, other.u, rtol=0, atol=1e-14)
        assert torch.allclose(stepped.v, other.v, rtol=0, atol=1e-14)
        clean = gd(small, start, [Schedule(0.1)], 1).final
        assert not torch.allclose(stepped.u, clean.u, rtol=0, atol=1e-6)
