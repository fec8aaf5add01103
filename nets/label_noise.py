"""Label noise of the three papers: static flips, fresh flips per batch or per access, Gaussian noise on targets.

Draws come from named streams: static ones from (root seed, set), fresh ones from (root seed, seed, step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nets.images import ImageSet, resident
from theory.streams import named_generator

ASYMMETRIC_CIFAR10 = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
"""truck → automobile, bird → airplane, deer → horse, cat ↔ dog (Patrini et al. 2017)."""


@dataclass(frozen=True)
class FreshNoise:
    """Label noise drawn anew every step; static flips are a data set of their own, :func:`flip_symmetric`.

    Attributes:
        kind: ``any class`` (:func:`fresh_batch_flips`), ``different class`` (:func:`fresh_different_class`) or
            ``gaussian`` (:func:`noisy_targets`).
        amount: share of labels replaced, or standard deviation of the targets' noise.

    Raises:
        ValueError: an unknown kind, an amount that is not usable.
    """

    kind: Literal["any class", "different class", "gaussian"]
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in ("any class", "different class", "gaussian"):
            raise ValueError(
                f"there is no label noise '{self.kind}': choose 'any class', 'different class' or 'gaussian'."
            )
        if self.kind == "gaussian":
            _check_scale(self.amount)
        else:
            _check(self.amount)

    def __call__(
        self, y: Tensor, classes: int, step: int, seed: int = 0, root_seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Labels (B,) or, ``gaussian``, targets (B, classes) of one minibatch."""
        if self.kind == "gaussian":
            return noisy_targets(y, self.amount, classes, step, seed, root_seed, dtype)
        flips = fresh_batch_flips if self.kind == "any class" else fresh_different_class
        return flips(y, self.amount, classes, step, seed, root_seed)


def flip_symmetric(images: ImageSet, share: float, root_seed: int = 0) -> ImageSet:
    """Replace the labels of exactly ⌊share·n⌋ training images by uniformly drawn classes, once and for all.

    The drawn class may be the true one. Source: Andriushchenko et al. (2023), ``sym``.
    """
    chosen, generator = _chosen(images, share, root_seed)
    y = images.train_y.clone()
    y[chosen] = torch.from_numpy(generator.integers(0, images.classes, len(chosen))).to(y)
    return _with_labels(images, y)


def flip_asymmetric(images: ImageSet, share: float, to: dict[int, int] | None = None, root_seed: int = 0) -> ImageSet:
    """Replace the labels of ⌊share·n⌋ training images by the class that each is confused with, c → ``to[c]``.

    Classes that ``to`` does not name keep their label; c → c + 1 modulo the number of classes when ``to`` is None.
    """
    chosen, _ = _chosen(images, share, root_seed)
    table = torch.arange(images.classes)
    if to is None:
        table = (table + 1) % images.classes
    for source, target in (to or {}).items():
        if not (0 <= source < images.classes and 0 <= target < images.classes):
            raise ValueError(f"{source} → {target} is no pair of the {images.classes} classes: give class numbers.")
        table[source] = target
    y = images.train_y.clone()
    y[chosen] = table.to(y.device)[y[chosen]]
    return _with_labels(images, y)


def fresh_batch_flips(y: Tensor, share: float, classes: int, step: int, seed: int = 0, root_seed: int = 0) -> Tensor:
    """Labels of one minibatch with Binomial(B, share) of them replaced by uniform classes, anew every step.

    Source: Andriushchenko et al. (2023), ``sgd_p_label_noise``.
    """
    _check(share)
    generator = named_generator(root_seed, "fresh flips", seed, block=step)
    flipped = generator.random(len(y)) < share
    return torch.where(_to(flipped, y).bool(), _to(generator.integers(0, classes, len(y)), y), y)


def fresh_different_class(
    y: Tensor, share: float, classes: int, step: int, seed: int = 0, root_seed: int = 0
) -> Tensor:
    """Labels of one minibatch, each replaced with probability ``share`` by a uniform *different* class.

    Source: Chen, Kunin et al. (2023), label noise at every access.
    """
    _check(share)
    generator = named_generator(root_seed, "different class", seed, block=step)
    flipped, shift = generator.random(len(y)) < share, generator.integers(1, classes, len(y))
    return (y + _to(shift * flipped, y)) % classes


def noisy_targets(
    y: Tensor, scale: float, classes: int, step: int, seed: int = 0, root_seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """One-hot targets plus ``scale`` times standard normal noise, fresh every step, shape (B, classes).

    Source: Chen, Kunin et al. (2023), CIFAR-10 with noisy targets.
    """
    _check_scale(scale)
    generator = named_generator(root_seed, "noisy targets", seed, block=step)
    noise = resident(generator.standard_normal((len(y), classes)), y.device).to(dtype)
    return functional.one_hot(y, classes).to(dtype) + scale * noise


def _chosen(images: ImageSet, share: float, root_seed: int) -> tuple[Tensor, np.random.Generator]:
    _check(share)
    generator = named_generator(root_seed, "static flips", images.name)
    chosen = generator.permutation(images.n)[: int(share * images.n)]
    return torch.from_numpy(chosen).to(images.train_y.device), generator


def _check(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"a share {share} of labels cannot be changed: choose a number from 0 to 1.")


def _check_scale(scale: float) -> None:
    if not 0 <= scale < float("inf"):
        raise ValueError(f"label noise {scale} is not usable: choose a number >= 0.")


def _to(values: np.ndarray, y: Tensor) -> Tensor:
    return resident(values, y.device).to(y.dtype)


def _with_labels(images: ImageSet, y: Tensor) -> ImageSet:
    return ImageSet(images.train_x, y, images.test_x, images.test_y, images.classes, images.name)
