"""What a device can do for a loop over steps, so that every engine asks in one place and says once what is missing."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on the device: CUDA, with Triton installed; without it that is said once."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        say_once("Triton is not installed, so loops on the GPU run in plain torch: pip install triton.")
        return False
    return True


def interprets_triton(device: torch.device) -> bool:
    """Whether kernels run on CPU tensors in Triton's interpreter: for tests, slow, and chosen by nothing itself."""
    asked = os.environ.get("TRITON_INTERPRET") == "1"
    return asked and device.type == "cpu" and importlib.util.find_spec("triton") is not None


@functools.cache
def say_once(sentence: str) -> None:
    """A warning, the first time."""
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)
