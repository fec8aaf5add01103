"""The diagonal linear network h(x) = ⟨u∘v, x⟩ in the coordinates in which SGD acts multiplicatively.

With a = u + v, b = u - v:  w = u∘v = (a² - b²)/4,  α = u² - v² = a∘b,  z = ½ ln|a/b|,  w = (|α|/2) sinh 2z,
and one gradient step with residual-weighted inputs g_j reads a_j ← a_j(1 - g_j), b_j ← b_j(1 + g_j).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LN2 = math.log(2.0)


@dataclass(frozen=True, eq=False)
class DiagonalState:
    """States of diagonal networks with more range than floating point: a = mantissa · 2^exponent, b likewise.

    α = a∘b decays geometrically under label noise and leaves the range of float64 long before a run ends; here
    ln|α| stays exact. All four tensors have shape (..., d); the exponents are int32.
    """

    a: Tensor
    b: Tensor
    a_exponent: Tensor
    b_exponent: Tensor

    @classmethod
    def from_uv(cls, u: Tensor, v: Tensor) -> DiagonalState:
        """The state with weights u, v of shape (..., d)."""
        a, b = torch.broadcast_tensors(u + v, u - v)
        none = torch.zeros(a.shape, dtype=torch.int32, device=a.device)
        return cls(a.clone(), b.clone(), none, none.clone())

    @classmethod
    def from_logs(cls, log_a: Tensor, log_b: Tensor) -> DiagonalState:
        """The state with a = e^{log_a} > 0 and b = e^{log_b} > 0, whatever the size of the logs."""
        (a, a_exponent), (b, b_exponent) = _split_exponent(log_a), _split_exponent(log_b)
        return cls(a, b, a_exponent, b_exponent)

    def __getitem__(self, index: Any) -> DiagonalState:
        """Some of a batch of states: ``index`` selects along the leading axes of all parts."""
        return DiagonalState(self.a[index], self.b[index], self.a_exponent[index], self.b_exponent[index])

    @property
    def log_a(self) -> Tensor:
        """ln|a|."""
        return _log_abs(self.a, self.a_exponent)

    @property
    def log_b(self) -> Tensor:
        """ln|b|."""
        return _log_abs(self.b, self.b_exponent)

    @property
    def log_alpha(self) -> Tensor:
        """ln|α| = ln|a| + ln|b|; -inf where a coordinate sits on |u| = |v|."""
        return self.log_a + self.log_b

    @property
    def mean_log_alpha(self) -> Tensor:
        """The mean of ln|α| over coordinates, shape (...)."""
        product = (self.a * self.b).abs_()
        if self.a.device.type != "cpu" or not product.numel() or product.min() < torch.finfo(product.dtype).tiny:
            return self.log_alpha.mean(-1)
        logs = product.log_().sum(-1)  # one logarithm in place of two, where the product keeps its digits
        if not self._plain:
            logs += LN2 * (self.a_exponent + self.b_exponent).sum(-1).to(logs)
        return logs / self.a.shape[-1]

    @property
    def z(self) -> Tensor:
        """The mirror coordinate z = ½ ln|a/b|."""
        return (self.log_a - self.log_b) / 2

    @cached_property
    def w(self) -> Tensor:
        """The linear predictor u∘v = (a² - b²)/4."""
        a, b = self.true_ab
        return (a - b).mul_(a + b).div_(4)

    @property
    def u(self) -> Tensor:
        """u = (a + b)/2."""
        a, b = self.true_ab
        return (a + b) / 2

    @property
    def v(self) -> Tensor:
        """v = (a - b)/2."""
        a, b = self.true_ab
        return (a - b) / 2

    @cached_property
    def true_ab(self) -> tuple[Tensor, Tensor]:
        """a and b as plain floats (zero where they are below the float range)."""
        if self._plain:
            return self.a, self.b
        return _with_exponent(self.a, self.a_exponent), _with_exponent(self.b, self.b_exponent)

    @cached_property
    def _plain(self) -> bool:
        """No exponent is needed; looked at where looking does not make a device wait."""
        return self.a.device.type == "cpu" and not (self.a_exponent.any() or self.b_exponent.any())

    def expand(self, *batch: int) -> DiagonalState:
        """A writable copy broadcast to shape (*batch, d)."""
        parts = (self.a, self.b, self.a_exponent, self.b_exponent)
        return DiagonalState(*(part.expand(*batch, part.shape[-1]).clone() for part in parts))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DiagonalState:
        """The same states on another device or in another precision."""
        return DiagonalState(
            self.a.to(device=device, dtype=dtype),
            self.b.to(device=device, dtype=dtype),
            self.a_exponent.to(device=device),
            self.b_exponent.to(device=device),
        )


def _log_abs(mantissa: Tensor, exponent: Tensor) -> Tensor:
    return mantissa.abs().log() + LN2 * exponent.to(mantissa.dtype)  # a Python float times int32 would be float32


def _with_exponent(mantissa: Tensor, exponent: Tensor) -> Tensor:
    return mantissa * torch.exp2(exponent.to(mantissa.dtype))


def _split_exponent(log: Tensor) -> tuple[Tensor, Tensor]:
    """e^log as mantissa in [1, 2) and power of two, when the log leaves the comfortable range; else exponent 0."""
    far = log.abs() > 100.0
    exponent = torch.where(far, (log / LN2).floor(), torch.zeros_like(log))
    return torch.exp(log - LN2 * exponent), exponent.to(torch.int32)
