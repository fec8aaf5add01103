"""Regression problems: the data that a prediction, a simulation and a run all start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Regression:
    """Training and held-out data of one regression problem.

    Attributes:
        X: inputs, shape (n, d).
        y: targets, shape (n,).
        X_test: held-out inputs, shape (n_test, d); ``n_test`` may be 0.
        y_test: held-out targets, shape (n_test,).
        truth: the linear map behind noiseless targets, shape (d,), or ``None`` when there is none.
        name: what tables and figures call it.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite entries, no sample at all.
    """

    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    truth: Tensor | None = None
    name: str = "regression"

    def __post_init__(self) -> None:
        if self.X.ndim != 2 or 0 in self.X.shape:
            raise ValueError(
                f"X needs shape (n, d) with n, d >= 1, got {tuple(self.X.shape)}: give a 2-D table of inputs."
            )
        if self.y.shape != self.X.shape[:1]:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)} where X has {self.X.shape[0]} rows: give one target per row."
            )
        if self.X_test.ndim != 2 or self.X_test.shape[1] != self.X.shape[1] or len(self.X_test) != len(self.y_test):
            raise ValueError(
                f"held-out data of shapes {tuple(self.X_test.shape)} and {tuple(self.y_test.shape)} do not fit "
                f"training inputs with {self.X.shape[1]} columns: give the same columns and one target per row."
            )
        for what in ("X", "y", "X_test", "y_test"):
            bad = ~torch.isfinite(getattr(self, what))
            if bad.any():
                raise ValueError(
                    f"{what} of '{self.name}' has {int(bad.sum())} NaN or infinite entries: "
                    "drop or fill those rows before handing the data over."
                )

    @property
    def n(self) -> int:
        """Number of training samples."""
        return self.X.shape[0]

    @property
    def d(self) -> int:
        """Number of input features."""
        return self.X.shape[1]

    @property
    def mean_square(self) -> Tensor:
        """m_j = (1/n) Σ_i x_ij², shape (d,)."""
        return self.X.square().mean(0)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Regression:
        """The same problem on another device or in another precision."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype)

        return replace(
            self,
            X=move(self.X),
            y=move(self.y),
            X_test=move(self.X_test),
            y_test=move(self.y_test),
            truth=None if self.truth is None else move(self.truth),
        )


def gaussian_sparse(n: int, d: int, nonzero: int, n_test: int = 1000, seed: int = 0) -> Regression:
    """Noiseless sparse linear regression with Gaussian inputs, draw for draw the one of AVPF's notebooks.

    x ~ N(0, I_d), y = ⟨θ*, x⟩, θ* = |g| on the first ``nonzero`` coordinates for Gaussian g, scaled to unit norm.
    numpy's legacy generator is used on purpose: its stream is frozen, so the published data come out to the bit.

    Raises:
        ValueError: ``n``, ``d``, ``nonzero`` not positive, or ``nonzero`` > ``d``.
    """
    if min(n, d, nonzero) < 1 or n_test < 0 or nonzero > d:
        raise ValueError(f"n={n}, d={d}, nonzero={nonzero} do not fit: choose n >= 1, d >= 1 and 1 <= nonzero <= d.")
    draws = np.random.RandomState(seed)
    X, X_test = draws.standard_normal((n, d)), draws.standard_normal((n_test, d))
    truth = draws.standard_normal(d)
    truth[nonzero:] = 0.0
    truth = np.abs(truth) / np.linalg.norm(truth)
    as_tensor = torch.from_numpy
    return Regression(
        X=as_tensor(X), y=as_tensor(X @ truth), X_test=as_tensor(X_test), y_test=as_tensor(X_test @ truth),
        truth=as_tensor(truth), name=f"gaussian {n}x{d}, r={nonzero}",
    )  # fmt: skip


def standardized_split(features: np.ndarray, target: np.ndarray, n_train: int, seed: int, name: str) -> Regression:
    """A table split into ``n_train`` random training rows and the rest held out.

    Columns and target are centred and scaled by the whole table's mean and standard deviation.

    Raises:
        ValueError: fewer rows than ``n_train`` + 1, NaN entries, or a column that never changes.
    """
    features, target = np.asarray(features, float), np.asarray(target, float)
    if not 1 <= n_train < len(features):
        raise ValueError(
            f"{n_train} training rows asked of a table with {len(features)}: choose between 1 and {len(features) - 1}."
        )
    table = np.column_stack([features, target])
    if not np.isfinite(table).all():
        raise ValueError(
            f"the table '{name}' has {int((~np.isfinite(table)).sum())} NaN or infinite entries: "
            "drop or fill those rows before handing it over."
        )
    spread = table.std(0)
    if (spread <= 1e-12 * np.abs(table).max(0)).any():
        raise ValueError(f"column {int(np.argmin(spread))} of the table '{name}' never changes: leave it out.")
    table = (table - table.mean(0)) / spread
    rows = np.random.RandomState(seed).permutation(len(table))
    X, y = torch.from_numpy(table[:, :-1].copy()), torch.from_numpy(table[:, -1].copy())
    train, held_out = rows[:n_train], rows[n_train:]
    return Regression(X[train], y[train], X[held_out], y[held_out], name=name)


def diabetes_quadratic(n_train: int = 20, seed: int = 0) -> Regression:
    """scikit-learn's diabetes table with all degree-2 terms: 442 patients, 10 + 10 + 45 - 1 = 64 columns.

    The square of the binary column is left out because, standardised, it repeats the column itself.
    ``n_train`` < 64 patients are trained on, the others held out.
    """
    from sklearn.datasets import load_diabetes

    table = load_diabetes()
    base, sex = table.data, table.feature_names.index("sex")
    pairs = [(i, j) for i in range(10) for j in range(i, 10) if (i, j) != (sex, sex)]
    features = np.column_stack([base, *(base[:, i] * base[:, j] for i, j in pairs)])
    return standardized_split(features, table.target, n_train, seed, f"diabetes {n_train}x64")


def read_table(path: str | Path, target: str, n_train: int, seed: int = 0) -> Regression:
    """A user's CSV file as a regression problem: every numeric column but ``target`` is an input.

    Raises:
        ValueError: no such file, no such column, text columns, NaN entries.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no table at '{path}': give the path of a CSV file with a header line.")
    try:
        frame = pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as fault:
        raise ValueError(f"'{path}' cannot be read as CSV ({fault}): give a text table with a header line.") from fault
    if target not in frame.columns:
        raise ValueError(
            f"'{path.name}' has no column '{target}': choose the target among {', '.join(map(str, frame.columns))}."
        )
    text = [str(column) for column in frame.columns if not pd.api.types.is_numeric_dtype(frame[column])]
    if text:
        raise ValueError(f"columns {', '.join(text)} of '{path.name}' are not numbers: encode or drop them.")
    features = frame.drop(columns=target).to_numpy(float)
    return standardized_split(features, frame[target].to_numpy(float), n_train, seed, path.stem)
