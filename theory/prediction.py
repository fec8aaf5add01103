"""A prediction: a number with the error it admits to, and what would be seen if the mechanism did nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """Where a formula comes from, e.g. ``Reference("Andriushchenko et al.", 2023, "Prop. 2")``."""

    authors: str
    year: int
    where: str

    def __str__(self) -> str:
        return f"{self.authors} ({self.year}), {self.where}"


@dataclass(frozen=True, eq=False)
class Prediction:
    """A predicted observable.

    Attributes:
        observable: its name, with units where it has any.
        value: scalar, or one entry per replicate when the prediction uses something measured in that replicate.
        null: what would be seen if the mechanism did nothing.
        error: the order the derivation gives up, as a fraction of the effect |value - null|.
        source: where the formula stands.
        standard_error: the value's own sampling error, when it comes from simulated paths.
        given: what measured input it uses (``""`` = data, initialisation and schedule only, i.e. *ab initio*).
    """

    observable: str
    value: Tensor
    null: float
    error: float
    source: Reference
    standard_error: float = 0.0
    given: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", torch.as_tensor(self.value, dtype=torch.float64))
        if not 0 <= self.error < float("inf"):
            raise ValueError(f"the error of '{self.observable}' is {self.error}: state a finite fraction >= 0.")


AVPF = "Andriushchenko, Varre, Pillaud-Vivien, Flammarion"
PPF = "Pesme, Pillaud-Vivien, Flammarion"
