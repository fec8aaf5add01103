"""Augmentation on the device, for whole minibatches: padded random crops, horizontal flips, cutout.

What is drawn depends on (root seed, seed, step) alone, so that a resumed run sees the same images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nets.images import resident
from theory.streams import named_generator


@dataclass(frozen=True)
class Augmentation:
    """What is done to every image of a minibatch.

    Attributes:
        crop: zero padding on each side before a random crop back to size (4 in the papers), 0 for none.
        flip: mirror half of the images left to right.
        cutout: side of a square set to 0, its centre uniform over the image, 0 for none.

    Raises:
        ValueError: a negative size.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        if min(self.crop, self.cutout) < 0:
            raise ValueError(f"crop {self.crop} and cutout {self.cutout} are not usable: choose 0 or more.")

    def __call__(self, x: Tensor, step: int, seed: int = 0, root_seed: int = 0) -> Tensor:
        """Augmented images, shape (B, channels, height, width), on the device and in the dtype of ``x``."""
        return self.apply(x, resident(self.draw(len(x), step, seed, root_seed), x.device))

    def draw(self, n: int, step: int, seed: int = 0, root_seed: int = 0) -> np.ndarray:
        """What happens to each of n images of one step, uniform in [0, 1): crop (2), flip, cutout (2); (5, n)."""
        return named_generator(root_seed, "augmentation", seed, block=step).random((5, n))

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """The same for given draws, shape (5, B) on the device of ``x``."""
        n, channels, height, width = x.shape

        def uniform(row: int, below: int) -> Tensor:
            """Integers in [0, below) from one row of the draws."""
            return (draws[row] * below).long()

        if self.crop:
            padded = functional.pad(x, [self.crop] * 4)
            top, left = uniform(0, 2 * self.crop + 1), uniform(1, 2 * self.crop + 1)
            rows = top[:, None] + torch.arange(height, device=x.device)
            columns = left[:, None] + torch.arange(width, device=x.device)
            each, channel = (torch.arange(size, device=x.device) for size in (n, channels))
            # Every axis is indexed, so that the result lies in memory as x does. Moving channels last and back leaves
            # strides that are ambiguous for one channel, with which torch's convolutions write past their memory.
            x = padded[
                each[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
            ]
        if self.flip:
            x = torch.where(uniform(2, 2).bool()[:, None, None, None], x.flip(-1), x)
        if self.cutout:
            distance = [
                (torch.arange(size, device=x.device) - (uniform(row, size))[:, None] + self.cutout // 2)
                for row, size in ((3, height), (4, width))
            ]
            inside = [(d >= 0) & (d < self.cutout) for d in distance]
            x = x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1), 0.0)
        return x
