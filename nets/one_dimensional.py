"""SGD on h(x) = θ²x with per-sample loss ¼(y - θ²x)², y = θ*²x: the network of AVPF's Prop. 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nets.sampling import BatchStream
from theory.minibatch import Minibatch

BLOCK = 4096


def sgd_path(
    x: Tensor, theta_star: float, theta0: float, step_sizes: Sequence[float], steps: int, seeds: Sequence[int],
    root_seed: int = 0,
) -> Tensor:  # fmt: skip
    """θ after every step, shape (steps + 1, step sizes, seeds), one sample a step with replacement.

    The literal recursion θ ← θ - η (θ²x - y) θ x. All step sizes see the same draws of a seed.

    Args:
        x: inputs, shape (n,).

    Raises:
        ValueError: a step size that is not positive, no seed, a negative number of steps.
    """
    if steps < 0 or not len(seeds) or not all(0 < eta < float("inf") for eta in step_sizes):
        raise ValueError("a run needs positive step sizes, at least one seed and a number of steps >= 0.")
    stream = BatchStream(len(x), Minibatch(), list(seeds), root_seed)
    eta = torch.tensor(list(step_sizes), dtype=x.dtype, device=x.device).unsqueeze(1)
    theta = x.new_full((len(eta), len(seeds)), theta0)
    path = x.new_empty((steps + 1, *theta.shape))
    path[0] = theta
    for begin in range(0, steps, BLOCK):
        length = min(BLOCK, steps - begin)
        draws = x[torch.from_numpy(stream.block(length)[:, :, 0]).to(x.device).long()].T  # (length, seeds)
        for k in range(length):
            inputs = draws[k]
            theta = theta - eta * (theta.square() * inputs - theta_star**2 * inputs) * theta * inputs
            path[begin + k + 1] = theta
    return path
