"""Gradients of many convolutional networks as one compiled loop (CPU, float32 or float64).

A network's minibatch goes forward and back before the next one's turn, in buffers that stay in cache. Its numbers are
the same to the bit however many run beside it and on any number of threads. Operations are those of
:mod:`nets.convolutional_plan`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from nets.compiled_elements import activate, activate_back, loss_slopes
from nets.convolutional_elements import add_up, average, average_back, pass_on
from nets.convolutional_layers import convolve, convolve_back
from nets.convolutional_norms import normalize, normalize_back, rescale
from nets.convolutional_plan import ACTIVATION, CONVOLUTION, GIVEN, NORM, SUM

_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(nogil=True, **_COMPILED)  # type: ignore[untyped-decorator]
def gradients(  # type: ignore[no-untyped-def]
    theta, X, targets, weights, slopes, operations, starts, products, size, loss, out, losses, first, step
):
    """∂/∂θ of Σ_i w_i ℓ_i + ⟨s_i, h_i⟩, and ℓ, of networks ``first``, ``first`` + ``step``, …

    Args:
        theta: shape (R, p).
        X: shape (R or 1, B·pixels·channels), channels last.
        targets: shape (R or 1, B, outputs).
        weights, slopes: w, shape (R, B), and s, shape (R, B, outputs), or (R, 0, 0) for zeros.
        operations, starts, products, size: of the plan.
        out, losses: shapes (R, p), zeros, and (R, B).
    """
    R, B = losses.shape
    a = np.zeros(size, theta.dtype)
    for r in range(first, R, step):
        x, target = X[min(r, len(X) - 1)], targets[min(r, len(targets) - 1)]
        _forward(a, theta[r], x, operations, starts, products, B)
        end = operations[-1]
        places = (end.y, end.y_gradient, end.y_channels)
        loss_slopes(a, places, target, weights[r], slopes[r], loss, losses[r])
        for i in range(len(operations) - 1, -1, -1):
            _back(a, operations[i], theta[r], out[r], starts, products, B)


@njit(nogil=True, **_COMPILED)  # type: ignore[untyped-decorator]
def values(theta, X, operations, starts, products, size, B, spans, out, first, step):  # type: ignore[no-untyped-def]
    """What a pass leaves in ``spans`` of the buffers, shape (R, Σ lengths); other arguments as for :func:`gradients`.

    Args:
        spans: where each begins, and its length, shape (spans, 2).
    """
    a = np.zeros(size, theta.dtype)
    for r in range(first, len(theta), step):
        _forward(a, theta[r], X[min(r, len(X) - 1)], operations, starts, products, B)
        at = 0
        for place, length in spans:
            for j in range(length):
                out[r, at + j] = a[place + j]
            at += length


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _forward(a, theta, x, operations, starts, products, B):  # type: ignore[no-untyped-def]
    for j in range(len(x)):
        a[j] = x[j]
    for i in range(len(operations)):
        op = operations[i]
        n = B * op.y_pixels * op.y_channels
        if op.kind == CONVOLUTION:
            convolve(a, op, theta, starts, products, B)
        elif op.kind == NORM:
            if op.group == GIVEN:
                rescale(a, op, theta, B)
            else:
                normalize(a, op, theta, B)
        elif op.kind == ACTIVATION:
            activate(a, op.x, op.y, n, op.function)
        elif op.kind == SUM:
            add_up(a, op.x, op.z, op.y, n)
        else:
            average(a, op, B)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _back(a, op, theta, out, starts, products, B):  # type: ignore[no-untyped-def]
    """From the gradient in y to those in x, z and θ."""
    n = B * op.y_pixels * op.y_channels
    if op.kind == CONVOLUTION:
        convolve_back(a, op, out, starts, products, B)
    elif op.kind == NORM:
        normalize_back(a, op, theta, out, B)
    elif op.kind == ACTIVATION:
        activate_back(a, op.y, op.y_gradient, op.x_gradient, n, op.function, op.x_again)
    elif op.kind == SUM:
        pass_on(a, op.y_gradient, op.z_gradient, n, op.z_again)
        if op.x_gradient != op.y_gradient:
            pass_on(a, op.y_gradient, op.x_gradient, n, op.x_again)
    else:
        average_back(a, op, B)
