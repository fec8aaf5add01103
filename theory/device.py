"""What a device can do for a loop over steps, so that every engine asks in one place and says once what is missing."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on the device: CUDA with Triton installed, or the CPU in Triton's interpreter.

    The interpreter (``TRITON_INTERPRET=1``) is for tests: it is slow, and nothing chooses it by itself.
    A CUDA device without Triton is warned of once.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is not None:
            return True
        say_once("Triton is not installed, so loops on the GPU run in plain torch: pip install triton.")
        return False
    return False


def interprets_triton() -> bool:
    """Whether Triton kernels run on CPU tensors here, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@functools.cache
def say_once(sentence: str) -> None:
    """A warning, the first time."""
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)
