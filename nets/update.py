"""How a minibatch gradient becomes a step: the options of AVPF's training code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware gradients: taken after an ascent of ``radius`` along the batch's, or each sample's, gradient.

    Attributes:
        radius: ρ ≥ 0.
        per_sample: ascend sample by sample, by 2ρ r_i x_i∘v (1-SAM), instead of by ρ times the batch gradient (n-SAM).
        loss_derivative_only: with ``per_sample``, only the residual is taken at the ascended weights.
    """

    radius: float
    per_sample: bool = False
    loss_derivative_only: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.radius < float("inf"):
            raise ValueError(f"SAM radius {self.radius} is not usable: choose a number >= 0.")


@dataclass(frozen=True)
class Update:
    """What is done besides stepping along the gradient; the default is plain SGD.

    Attributes:
        weight_decay: λ of θ ← … - λθ (decoupled, not multiplied by the step size).
        balance_shrinkage: ρ: the larger of |u_j|, |v_j| shrinks by the factor 1 - ρ, the smaller grows by 1 + ρ.
        normalized: the gradients in u and in v are each scaled to unit norm.
        sam: sharpness-aware gradients.
        label_noise: standard deviation of explicit label noise, fresh for every sample drawn.
        averaging: ω of the running average θ̄ ← ωθ̄ + (1-ω)θ; what is measured is then θ̄.
    """

    weight_decay: float = 0.0
    balance_shrinkage: float = 0.0
    normalized: bool = False
    sam: SAM | None = None
    label_noise: float = 0.0
    averaging: float = 0.0

    def __post_init__(self) -> None:
        for what in ("weight_decay", "balance_shrinkage", "label_noise"):
            if not 0 <= getattr(self, what) < float("inf"):
                raise ValueError(f"{what.replace('_', ' ')} {getattr(self, what)} is not usable: choose a number >= 0.")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging weight {self.averaging} is not usable: choose a number in [0, 1).")

    @property
    def multiplicative(self) -> bool:
        """Whether steps stay multiplicative in (u + v, u - v)."""
        return not (self.balance_shrinkage or self.normalized or self.sam)
