"""Small convolutional networks in eval mode, in the compiled loops of :mod:`nets.convolutional_gradient` (CPU).

What torch computes to rounding: outputs, what blocks put out, and the statistics that BatchNorm normalises by. CPU
libraries have no fast path where channels are few.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nets.batch_statistics import on_batch_statistics
from nets.convolutional_gradient import PARAMETERS, passes
from nets.convolutional_plan import Plan, UnknownModuleError, plan

CHUNK = 32  # images of a pass, whose values stay in cache
PRECISIONS = (torch.float32, torch.float64)


class ConvolutionalEvaluation:
    """Passes of one architecture with any parameters.

    Args:
        module: its parameters, one after the other, are θ.
        blocks: submodules whose outputs are wanted, by name.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str] = ()) -> None:
        self._module, self._blocks = copy.deepcopy(module).eval(), tuple(blocks)
        self._norms = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
        self._training = on_batch_statistics(module)
        self._places, self.p = dict[str, int](), 0
        for name, parameter in module.named_parameters():
            self._places[name], self.p = self.p, self.p + parameter.numel()
        self._statistics, end = dict[str, int](), self.p
        for name, part in self._norms.items():
            for which in ("running_mean", "running_var"):
                self._statistics[f"{name}.{which}"] = end
                end += part.num_features
        self._s, self._plans = end - self.p, dict[tuple[object, ...], Plan]()

    def statistics(self, theta: Tensor, X: Tensor, chunk: int) -> Tensor:
        """BatchNorm's means and variances one after the other, shape (R, s): means over chunks of X in train mode.

        s is 0 where there is no BatchNorm.

        They are what :func:`nets.averaging.estimate_statistics` leaves in a module, a last chunk left out alike.

        Args:
            theta: shape (R, p).
            X: images, shape (n, channels, height, width).

        Raises:
            ValueError: a single number a channel, which has no variance.
        """
        if chunk < 1:
            raise ValueError(f"chunks of {chunk} images do not fit the network: choose 1 or more.")
        self._check(theta, theta[:, self.p :], X)
        if not self._norms:
            return theta[:, :0]
        chunk = min(chunk, len(X))
        chunks = X[: len(X) // chunk * chunk].unflatten(0, (-1, chunk))
        made = self._plan(chunks.shape[1:], training=True)
        norms, counts = zip(*(made.norms[name] for name in self._norms), strict=True)
        if min(counts) < 2:
            raise ValueError("BatchNorm has one number a channel, of which there is no variance: give more images.")
        rows = []
        for row in theta:
            parts, found = [], passes(made, row.expand(len(chunks), -1), chunks, norms)
            for norm, count, (mean, scale) in zip(
                self._norms.values(), counts, (one.double().unbind(1) for one in found), strict=True
            ):
                parts += [mean.mean(0), (scale**-2 - norm.eps).mean(0) * (count / (count - 1))]
            rows.append(torch.cat(parts))
        return torch.stack(rows).to(theta)

    def outputs(self, theta: Tensor, statistics: Tensor, X: Tensor) -> Tensor:
        """What the networks put out, shape (R, n, outputs).

        Args:
            theta: shape (R, p).
            statistics: of these networks, shape (R, s).
            X: images, shape (n, channels, height, width).
        """
        return self._passes(theta, statistics, X, ())[0]

    def blocks(self, theta: Tensor, statistics: Tensor, X: Tensor) -> dict[str, Tensor]:
        """What the blocks put out by name, units in torch's order, shapes (R, n, units); arguments as above."""
        return dict(zip(self._blocks, self._passes(theta, statistics, X, self._blocks)[1:], strict=True))

    def _passes(self, theta: Tensor, statistics: Tensor, X: Tensor, blocks: Sequence[str]) -> list[Tensor]:
        """Outputs, and what these blocks put out."""
        if statistics.shape[1:] != (self._s,):
            raise ValueError(f"statistics of shape {tuple(statistics.shape)} do not fit: give (R, {self._s}).")
        self._check(theta, statistics, X)
        runs = [self._run(row, X, blocks) for row in torch.cat([theta, statistics], 1)]
        return [torch.stack(parts) for parts in zip(*runs, strict=True)]

    def _run(self, row: Tensor, X: Tensor, blocks: Sequence[str]) -> list[Tensor]:
        """The same of one network."""
        whole, pieces = len(X) // CHUNK * CHUNK, list[list[Tensor]]()
        for part, chunk in ((X[:whole], CHUNK), (X[whole:], len(X) - whole)):
            if len(part):
                chunks = part.unflatten(0, (-1, chunk))
                made = self._plan(chunks.shape[1:], training=False)
                held = [made.end, *(made.parts[name] for name in blocks)]
                found = passes(made, row.expand(len(chunks), -1), chunks, held)
                pieces.append([one.unflatten(1, (chunk, -1)).flatten(0, 1).mT.flatten(1) for one in found])
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _check(self, theta: Tensor, statistics: Tensor, X: Tensor) -> None:
        """The loops check nothing."""
        kinds = {(part.dtype, part.device.type) for part in (theta, statistics, X)}
        if theta.ndim != 2 or theta.shape[1] != self.p or len(statistics) != len(theta) or X.ndim != 4 or not len(X):
            shapes = ", ".join(str(tuple(part.shape)) for part in (theta, statistics, X))
            raise ValueError(
                f"θ, statistics and images of shapes {shapes} do not fit: give (R, {self.p}), (R, s) and (n, channels, "
                "height, width)."
            )
        if len(kinds) > 1 or kinds.pop() not in {(dtype, "cpu") for dtype in PRECISIONS}:
            raise ValueError("θ, statistics and images of these kinds do not fit: convert them to one, on the CPU.")

    def _plan(self, shape: Sequence[int], training: bool) -> Plan:
        images, channels, height, width = shape
        key = (training, *shape)
        if key not in self._plans:
            places = self._places if training else self._places | self._statistics
            module, blocks = (self._training, ()) if training else (self._module, self._blocks)
            self._plans[key] = plan(module, places, images, (channels, height, width), blocks)
        return self._plans[key]


def convolutional_evaluation(
    module: nn.Module, X: Tensor, blocks: Sequence[str] = ()
) -> ConvolutionalEvaluation | None:
    """Compiled passes of a small network on images X (n, …), if the loops know it, else None."""
    size = sum(parameter.numel() for parameter in module.parameters())
    if size > PARAMETERS or X.ndim != 4 or X.device.type != "cpu" or X.dtype not in PRECISIONS:
        return None
    found = ConvolutionalEvaluation(module, blocks)
    try:
        for training in (True, False):
            found._plan((1, *X.shape[1:]), training)
    except UnknownModuleError:
        return None
    return found
