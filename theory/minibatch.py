"""How samples are drawn for one stochastic gradient, and the variance factor that follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Minibatch:
    """``size`` samples a step, drawn uniformly with or without replacement within the step.

    Raises:
        ValueError: a size below 1.
    """

    size: int = 1
    replacement: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"batch size {self.size} is not usable: choose 1 or more.")

    def variance_factor(self, n: int) -> float:
        """Variance of the minibatch gradient over that of one sample's: 1/B, times (n-B)/(n-1) without replacement."""
        if self.replacement:
            return 1.0 / self.size
        if self.size > n:
            raise ValueError(
                f"a batch of {self.size} cannot be drawn without replacement from {n} samples: "
                f"choose a batch size of at most {n}."
            )
        return (n - self.size) / (max(n - 1, 1) * self.size)
