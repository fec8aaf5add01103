"""Image classification data as resident tensors: the whole set lives on the device, batches are index look-ups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from theory.streams import named_generator


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Training and test images of one classification problem.

    Attributes:
        train_x: training images, shape (n, channels, height, width), floating point.
        train_y: their classes, shape (n,), int64.
        test_x, test_y: the same of held-out images.
        classes: number of classes.
        name: what tables and figures call it.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite pixels, labels that are no class.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    name: str = "images"

    def __post_init__(self) -> None:
        for part, x, y in (("training", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.ndim != 4 or y.shape != x.shape[:1] or x.shape[1:] != self.train_x.shape[1:]:
                raise ValueError(
                    f"{part} images of shape {tuple(x.shape)} with labels of shape {tuple(y.shape)} do not fit: "
                    "give (n, channels, height, width) and (n,)."
                )
            if not torch.isfinite(x).all():
                raise ValueError(f"{part} images of '{self.name}' have NaN or infinite pixels: drop those images.")
            if y.dtype != torch.int64 or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.classes):
                raise ValueError(f"{part} labels of '{self.name}' are not int64 numbers from 0 to {self.classes - 1}.")
        if not len(self.train_x):
            raise ValueError(f"'{self.name}' has no training image: give at least one.")

    @property
    def n(self) -> int:
        """Number of training images."""
        return len(self.train_x)

    def subset(self, train: int, test: int | None = None, seed: int | None = None) -> ImageSet:
        """The first ``train`` training images, and the first ``test`` test images (all by default).

        With a ``seed`` the training images are drawn without replacement from the stream "subset" instead; subsets of
        one seed are nested.

        Raises:
            ValueError: more images than there are, or fewer than 1.
        """
        test = len(self.test_x) if test is None else test
        if not (1 <= train <= self.n and 0 <= test <= len(self.test_x)):
            raise ValueError(
                f"{train} training and {test} test images were asked of '{self.name}': choose between 1 and {self.n} "
                f"training and up to {len(self.test_x)} test images."
            )
        rows: slice | Tensor = slice(train)
        if seed is not None:
            drawn = named_generator(seed, "subset").permutation(self.n)[:train]
            rows = torch.from_numpy(drawn).to(self.train_y.device)
        return replace(
            self, train_x=self.train_x[rows], train_y=self.train_y[rows],
            test_x=self.test_x[:test], test_y=self.test_y[:test],
        )  # fmt: skip

    def of_classes(self, *classes: int) -> ImageSet:
        """Only the images of these classes, renumbered 0, 1, … in the order given, e.g. horses against cars: (7, 1).

        Raises:
            ValueError: fewer than two classes, one twice, or one that there is not.
        """
        if len(set(classes)) < max(len(classes), 2) or not all(0 <= c < self.classes for c in classes):
            raise ValueError(
                f"classes {classes} of '{self.name}' make no problem: choose two or more different ones below "
                f"{self.classes}."
            )
        number = torch.full((self.classes,), -1, device=self.train_y.device)
        number[list(classes)] = torch.arange(len(classes), device=number.device)
        train, test = number[self.train_y], number[self.test_y]
        return replace(
            self, train_x=self.train_x[train >= 0], train_y=train[train >= 0], test_x=self.test_x[test >= 0],
            test_y=test[test >= 0], classes=len(classes), name=f"{self.name}, classes {' '.join(map(str, classes))}",
        )  # fmt: skip

    def standardized(self, by: Literal["channel", "pixel"] = "channel") -> ImageSet:
        """Mean 0 and deviation 1 over the training images, test images shifted and scaled like them.

        By ``channel``: each channel has its own mean and deviation (Chen et al. 2023). By ``pixel``: each pixel has its
        own mean, and all share one deviation (Jastrzębski et al. 2019). Andriushchenko et al. (2023) train on pixels
        as they are, in [0, 1].

        Raises:
            ValueError: another ``by``, images that are all the same.
        """
        x = self.train_x
        if by == "channel":
            mean, deviation = (statistic[:, None, None] for statistic in channel_statistics(x))
        elif by == "pixel":
            mean = x.mean(0)
            deviation = (x - mean).std(correction=0)
        else:
            raise ValueError(f"images are not standardised by '{by}': choose channel or pixel.")
        if not (deviation > 0).all():
            raise ValueError(f"training images of '{self.name}' do not differ, so there is no deviation to divide by.")
        return replace(self, train_x=(x - mean) / deviation, test_x=(self.test_x - mean) / deviation)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ImageSet:
        """The same images on another device or in another precision."""
        return replace(
            self, train_x=self.train_x.to(device=device, dtype=dtype), train_y=self.train_y.to(device=device),
            test_x=self.test_x.to(device=device, dtype=dtype), test_y=self.test_y.to(device=device),
        )  # fmt: skip


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all images and pixels, shapes (channels,)."""
    return x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)


def resident(values: np.ndarray, device: torch.device) -> Tensor:
    """Numbers drawn on the CPU as a tensor on the device; the host does not wait for a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def digits(train: int = 1500, seed: int = 0, dtype: torch.dtype = torch.float64) -> ImageSet:
    """scikit-learn's 1797 handwritten digits, 8x8 grey, pixels / 16, shuffled by the stream "digits split".

    The first ``train`` images of the shuffled order are trained on, the others held out.

    Raises:
        ValueError: ``train`` outside [1, 1797].
    """
    from sklearn.datasets import load_digits

    table = load_digits()
    total = len(table.target)
    if not 1 <= train <= total:
        raise ValueError(f"{train} training images were asked of {total} digits: choose between 1 and {total}.")
    order = named_generator(seed, "digits split").permutation(total)
    x = torch.from_numpy((table.data / 16.0).reshape(-1, 1, 8, 8)[order]).to(dtype)
    y = torch.from_numpy(table.target.astype(np.int64)[order])
    return ImageSet(x[:train], y[:train], x[train:], y[train:], 10, f"digits, n={train}")
