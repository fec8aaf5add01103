"""What the units of a network's blocks do on a set of inputs: activations caught on their way through, in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from theory.streams import named_generator

UNITS = 1000  # of a block, as published
CHUNK = 512


class DivergedError(ValueError):
    """A network of which nothing can be measured, because its numbers are NaN or infinite."""


@dataclass(frozen=True, eq=False)
class BlockFeatures:
    """One block's activations.

    Attributes:
        activations: of the units looked at, shape (n, at most ``units``), in the order in which they were drawn.
        positive: the share of all n x m activations of the block that are positive, a scalar.
        size: m, the number of the block's units; every channel at every pixel is one.
    """

    activations: Tensor
    positive: Tensor
    size: int


def block_activations(
    module: nn.Module, X: Tensor, blocks: Sequence[str] | None = None, *, units: int | None = UNITS,
    chunk: int = CHUNK, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """φ of every block on inputs X by the block's name, shapes (n, units); see :func:`block_features`.

    >>> list(block_activations(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(5, 3)))
    ['1']
    """
    found = block_features(module, X, blocks, units=units, chunk=chunk, seed=seed)
    return {name: features.activations for name, features in found.items()}


@torch.no_grad()
def block_features(
    module: nn.Module, X: Tensor, blocks: Sequence[str] | None = None, *, units: int | None = UNITS,
    chunk: int = CHUNK, seed: int = 0,
) -> dict[str, BlockFeatures]:  # fmt: skip
    """What every block puts out on inputs X, (n, ...), with running statistics; the module's modes are restored.

    Activations are the outputs of submodules, flattened. Where a block has more than ``units`` of them, that many are
    drawn without replacement from the stream "units", the block's name: the same ones at every call.

    Args:
        module: computes on its own device and dtype; X is brought there chunk by chunk.
        blocks: names of submodules, as in ``named_modules``; :func:`default_blocks` when None.
        units: at most so many a block, all of them when None.
        chunk: so many inputs a pass, which bounds memory and changes nothing else beyond rounding.

    Raises:
        ValueError: an unknown block or one that does not run once a pass, no inputs.
        DivergedError: activations that are NaN or infinite.

    Source: Andriushchenko et al. (2023), whose blocks 1 to 5 are those of ``nets.published_resnets``.
    """
    if not len(X) or chunk < 1 or (units is not None and units < 1):
        raise ValueError(f"{len(X)} inputs in chunks of {chunk}, {units} units a block: choose 1 or more of each.")
    parts = dict(module.named_modules())
    names = default_blocks(module, X) if blocks is None else tuple(blocks)
    for name in names:
        if name not in parts:
            raise ValueError(f"the network has no block '{name}': choose from {', '.join(filter(None, parts))}.")
    catchers = {name: _Catcher(name, len(X), units, seed) for name in names}
    with evaluating(module), ExitStack() as hooks:
        for name, catcher in catchers.items():
            hooks.callback(parts[name].register_forward_hook(catcher).remove)
        for x in moved(module, X, chunk):
            module(x)
            for catcher in catchers.values():
                catcher.advance(len(x))
    return {name: catcher.features() for name, catcher in catchers.items()}


def features_of(name: str, out: Tensor, *, units: int | None = UNITS, seed: int = 0) -> BlockFeatures:
    """The same of a block's outputs (n, ...) that are at hand; arguments and errors as for :func:`block_features`."""
    catcher = _Catcher(name, len(out), units, seed)
    catcher.catch(out)
    catcher.advance(len(out))
    return catcher.features()


def default_blocks(module: nn.Module, X: Tensor) -> tuple[str, ...]:
    """The blocks of a network by name, in the order of its parts.

    The parts called block1, block2, … where there are such, which are the published ones in ``nets.published_nets``.
    Else those of a Sequential: the last activation or residual block at each image size, every activation of a
    fully connected layer, and what the last linear layer reads. Only one input is run.

    Raises:
        ValueError: a module that is no Sequential, or has no activation: name its blocks then.
    """
    children = dict(module.named_children())
    if numbered := tuple(name for name in children if name.startswith("block") and name[5:].isdigit()):
        return numbered
    if not isinstance(module, nn.Sequential):
        raise ValueError("which parts of the network are its blocks is not clear: name them, as in named_modules().")
    shapes: dict[str, torch.Size] = {}
    with evaluating(module), torch.no_grad():
        x = next(moved(module, X, 1))
        for name, part in children.items():
            x = part(x)
            shapes[name] = x.shape[1:]
    names, chosen = list(children), dict[object, str]()
    for name in names[:-1]:
        if type(children[name]).__module__ == "torch.nn.modules.activation" or any(children[name].children()):
            chosen[shapes[name][1:] or name] = name  # a later one of the same image size takes the place
    if not chosen:
        raise ValueError("the network has no activation, so no block: name its blocks, as in named_modules().")
    linear = [names.index(name) for name in names[1:] if isinstance(children[name], nn.Linear)]
    read = names[max(linear) - 1] if linear else names[0]
    if linear and shapes[read].numel() != shapes[list(chosen.values())[-1]].numel():
        chosen[read] = read  # pooled features
    return tuple(name for name in names if name in chosen.values())


class _Catcher:
    """A forward hook that keeps one block's activations, chunk after chunk."""

    def __init__(self, name: str, n: int, units: int | None, seed: int) -> None:
        self._name, self._n, self._units, self._seed = name, n, units, seed
        self._first, self._new, self._size = 0, 0, 0
        self._drawn: Tensor | None = None
        self._kept, self._positive, self._finite = torch.empty(0), torch.zeros(()), torch.ones(())

    def __call__(self, part: nn.Module, inputs: object, out: Tensor) -> None:
        self.catch(out)

    def catch(self, out: Tensor) -> None:
        """What the block has put out in this pass."""
        if not isinstance(out, Tensor) or self._new or self._first + len(out) > self._n:
            raise ValueError(f"block '{self._name}' does not put out one tensor a pass, a row an input: name others.")
        flat, self._new = out.flatten(1), len(out)
        if not self._first:
            self._begin(flat)
        self._positive += (flat > 0).sum()
        self._finite &= flat.abs().amax() < torch.inf  # false for NaN
        rows = self._kept[self._first : self._first + len(flat)]
        if self._drawn is None:
            rows.copy_(flat)
        else:
            torch.index_select(flat, 1, self._drawn, out=rows)

    def _begin(self, flat: Tensor) -> None:
        self._size = flat.shape[1]
        if self._units is not None and self._size > self._units:
            drawn = named_generator(self._seed, "units", self._name).permutation(self._size)[: self._units]
            self._drawn = torch.from_numpy(drawn).to(flat.device)
        self._kept = flat.new_empty(self._n, self._size if self._drawn is None else len(self._drawn))
        self._positive = torch.zeros((), dtype=torch.int64, device=flat.device)
        self._finite = torch.ones((), dtype=torch.bool, device=flat.device)

    def advance(self, rows: int) -> None:
        """A pass has ended."""
        if self._new != rows:
            raise ValueError(f"block '{self._name}' does not run on every input of a pass: name others.")
        self._first, self._new = self._first + rows, 0

    def features(self) -> BlockFeatures:
        """What was caught."""
        if not self._finite:
            raise DivergedError(
                f"activations of block '{self._name}' are NaN or infinite, so the network has diverged: leave it out."
            )
        share = self._positive.to(torch.float64) / (self._n * self._size)
        return BlockFeatures(self._kept, share, self._size)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode for a while; each part has its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def moved(module: nn.Module, X: Tensor, chunk: int) -> Iterator[Tensor]:
    """X in chunks, on the device and in the dtype of the module's parameters."""
    like = next(module.parameters(), X)
    for x in X.split(chunk):
        yield x.to(device=like.device, dtype=like.dtype if x.is_floating_point() else None)
