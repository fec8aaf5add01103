"""Running averages of weights, and BatchNorm statistics that belong to them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn


class WeightAverage:
    """θ̄ ← τθ̄ + (1-τ)θ after every step, from θ̄ = θ at the start.

    Attributes:
        tensors: θ̄, one tensor a parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.tensors = [p.detach().clone() for p in parameters]
        self._update = get_ema_multi_avg_fn(decay)

    def update(self, parameters: Sequence[Tensor]) -> None:
        """One step."""
        self._update(self.tensors, [p.detach() for p in parameters], None)

    def module(self, like: nn.Module) -> nn.Module:
        """A copy of the module with averaged parameters, and with its running statistics as they are."""
        averaged = copy.deepcopy(like)
        with torch.no_grad():
            for p, mean in zip(averaged.parameters(), self.tensors, strict=True):
                p.copy_(mean)
        return averaged


def has_batch_norm(module: nn.Module) -> bool:
    """Whether there are running statistics to estimate."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def estimate_statistics(module: nn.Module, x: Tensor, chunk: int) -> None:
    """Set BatchNorm's running statistics to the mean over chunks of x, each passed through in train mode.

    A last chunk below ``chunk`` is left out unless it is the only one. Running averages of a training run belong to the
    weights that it passed through, not to their average. The module's mode is kept.
    Source: Izmailov et al. (2018); Andriushchenko et al. (2023), code for deep networks.

    Args:
        x: training images, shape (n, ...).
    """
    whole = max(len(x) // chunk, 1) * chunk
    update_bn(x[:whole].split(chunk), module)
