"""How a network is trained on images: the recipe, and what each step of it is fed.

Everything random is a pure function of (root seed, seed, step): a resumed run, and one on several devices, sees the
same images, augmentation and labels.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nets.augment import Augmentation
from nets.images import ImageSet, resident
from nets.label_noise import FreshNoise
from nets.objective import CROSS_ENTROPY, Loss
from nets.replicas import Epochs
from nets.training import Batches
from theory.minibatch import Minibatch
from theory.schedule import StepSizes

Precision = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Recipe:
    """SGD, m ← μm + g, θ ← θ - η_k m, g the minibatch gradient of the mean loss.

    Attributes:
        schedule: step sizes η_k; its decays refer to ``steps``.
        steps: number of SGD steps, see :meth:`per_epoch`.
        batch_size: B, over all devices together.
        sampling: ``epochs`` (a fresh order every epoch, the rest below B dropped) or ``replacement`` (B independent
            draws a step, as the theory has it).
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0, on all parameters, those of norms and biases too.
        decoupled: θ ← (1 - η_k λ)θ - η_k m instead of λ‖θ‖²/2 in the loss (g + λθ in place of g). Composer's decoupled
            SGD of weight decay w, an option of CKYG's code, shrinks θ by w η_k/η₀: there λ = w/η₀.
        loss: per sample; its mean over the minibatch is differentiated.
        augmentation: of the training images, on the device; None for none.
        label_noise: fresh every step; None for none. Static flips are a data set of their own (nets.label_noise).
        averaging: τ in [0, 1) of the running average of weights θ̄ ← τθ̄ + (1-τ)θ after every step, 0 for none.
        precision: of the parameters; ``bfloat16`` is autocast with parameters, momentum, average and loss in float32.
        channels_last: memory layout for convolutions on GPUs.
        compile: forward and backward pass through ``torch.compile``.
        deterministic: only deterministic kernels, no TF32: the same numbers in every run on the same machine.
        sync_batch_norm: several GPUs normalise by the statistics of the whole minibatch, instead of each by its own.

    Raises:
        ValueError: a number that is not usable, a sampling or precision that there is not.
    """

    schedule: StepSizes
    steps: int
    batch_size: int = 128
    sampling: Literal["epochs", "replacement"] = "epochs"
    momentum: float = 0.0
    weight_decay: float = 0.0
    decoupled: bool = False
    loss: Loss = CROSS_ENTROPY
    augmentation: Augmentation | None = None
    label_noise: FreshNoise | None = None
    averaging: float = 0.0
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    sync_batch_norm: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"{self.steps} steps of {self.batch_size} images are no training: give steps >= 0 and 1 or more images."
            )
        if self.sampling not in ("epochs", "replacement"):
            raise ValueError(f"there is no sampling '{self.sampling}': choose 'epochs' or 'replacement'.")
        for name, value in (("momentum", self.momentum), ("averaging", self.averaging)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} {value} is not usable: choose a number in [0, 1).")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight decay {self.weight_decay} is not usable: choose a number >= 0.")
        if self.precision not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"there is no precision '{self.precision}': choose float32, bfloat16 or float64.")

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters, images and loss."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @staticmethod
    def per_epoch(images: ImageSet, batch_size: int) -> int:
        """Steps of one epoch, ⌊n/B⌋.

        Raises:
            ValueError: a batch above n.
        """
        return Epochs(images.n, batch_size, [0], drop_rest=True).batches

    def identity(self) -> str:
        """All that changes the numbers of a run, as text."""
        sizes = self.schedule.step_sizes(self.steps)
        chosen = (
            self.steps, self.batch_size, self.sampling, self.momentum, self.weight_decay, self.decoupled,
            self.loss.name, self.augmentation, self.label_noise, self.averaging, self.precision, self.channels_last,
            self.compile, self.deterministic, self.sync_batch_norm,
        )  # fmt: skip
        return repr(chosen) + sizes.numpy().tobytes().hex()


class Feed:
    """Images and labels of each step, on the device, without a data loader and without making the host wait.

    Args:
        images: the resident set, in the recipe's dtype.
        share: which images of each minibatch to deliver: one device's.

    Raises:
        ValueError: a batch that cannot be drawn.
    """

    def __init__(self, images: ImageSet, recipe: Recipe, seed: int, root_seed: int, share: slice = slice(None)) -> None:
        self._images, self._recipe, self._seed, self._root, self._share = images, recipe, seed, root_seed, share
        n, size = images.n, recipe.batch_size
        self._rows: Epochs | Batches
        if recipe.sampling == "epochs":
            self._rows = Epochs(n, size, [seed], root_seed, drop_rest=True)
        else:
            self._rows = Batches(n, Minibatch(size), [seed], root_seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, channels, height, width) and labels (B,), or targets (B, classes), of one step."""
        recipe, device = self._recipe, self._images.train_x.device
        rows = resident(self._rows(step)[0].numpy(), device)
        labels = self._images.train_y[rows]
        if recipe.label_noise is not None:
            # Drawn for the whole minibatch, so that the share of each device does not change the draws.
            classes = self._images.classes
            labels = recipe.label_noise(labels, classes, step, self._seed, self._root, recipe.dtype)
        x = self._images.train_x[rows[self._share]]
        if recipe.augmentation is not None:
            draws = recipe.augmentation.draw(recipe.batch_size, step, self._seed, self._root)[:, self._share]
            x = recipe.augmentation.apply(x, resident(draws, device))
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout), labels[self._share]


@contextlib.contextmanager
def numerics(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Deterministic kernels without TF32, or on a GPU the fastest convolutions found by trial, while a run lasts.

    What was set before is set again afterwards.

    Raises:
        ValueError: a deterministic GPU run without the environment variable that cuBLAS asks for.
    """
    if deterministic and device.type == "cuda" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise ValueError(
            "deterministic training on a GPU needs the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8: set it "
            "before Python starts."
        )
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = torch.are_deterministic_algorithms_enabled()
    chosen, tf32 = (cudnn.benchmark, cudnn.deterministic), (cudnn.conv.fp32_precision, matmul.fp32_precision)
    torch.use_deterministic_algorithms(deterministic)
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    if deterministic:
        cudnn.conv.fp32_precision, matmul.fp32_precision = "ieee", "ieee"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.benchmark, cudnn.deterministic = chosen
        if deterministic:
            cudnn.conv.fp32_precision, matmul.fp32_precision = tf32
