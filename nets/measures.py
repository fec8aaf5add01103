"""What a network has learnt, block by block: sparsity coefficient, distinct features, independent neurons; its fit.

A diverged network is told in one sentence, or is NaN in a table; nothing is computed from NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nets.features import CHUNK, UNITS, BlockFeatures, DivergedError, block_features, default_blocks, evaluating, moved
from nets.jacobian import network_jacobian_rank
from nets.objective import CROSS_ENTROPY, Loss
from nets.unit_layer import UnitLayer
from nets.units import hidden_layers
from theory.independent_neurons import independent_count
from theory.sparsity import distinct_units
from theory.streams import named_generator

INPUTS = 21 * 512  # training images, as published
THRESHOLD = 0.95
COLUMNS = ("sparsity", "sampled sparsity", "distinct sparsity", "distinct", "independent")
"""What the columns of :func:`block_table` are."""


@dataclass(frozen=True)
class LayerCount:
    """How many of a layer's neurons are independent under the published rule, and how many there are."""

    name: str
    independent: int
    units: int


@dataclass(frozen=True)
class BlockMeasures:
    """One block on a set of inputs.

    Attributes:
        units: activations per input, every channel at every pixel.
        sampled: how many of them correlations were computed for.
        sparsity: share of positive activations, over all units and inputs: the sparsity coefficient, with duplicates.
        sampled_sparsity: the same over the sampled units.
        distinct_sparsity: the same with the activations of duplicates and of dead units counted as none.
        distinct: how many sampled units are alive and no duplicate of another.
        layers: independent neurons of every layer between the block before (or the input) and the block's end.
    """

    name: str
    units: int
    sampled: int
    sparsity: float
    sampled_sparsity: float
    distinct_sparsity: float
    distinct: int
    layers: tuple[LayerCount, ...] = ()

    @property
    def duplicates(self) -> float:
        """The part of the sparsity coefficient that duplicates make."""
        return self.sampled_sparsity - self.distinct_sparsity

    @property
    def independent(self) -> float:
        """Independent neurons as a share of all neurons of the block's layers; NaN where it has none."""
        total = sum(layer.units for layer in self.layers)
        return sum(layer.independent for layer in self.layers) / total if total else math.nan


@dataclass(frozen=True)
class Fit:
    """Mean loss and share of right answers on one set of samples."""

    loss: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class NetworkMeasures:
    """All measures of one network: its blocks in order, its fit by the sets' names, and its Jacobian's rank.

    Attributes:
        jacobian_rank: on ``jacobian_rows`` input-output pairs; None where it was not asked for.
    """

    blocks: tuple[BlockMeasures, ...]
    fits: Mapping[str, Fit] = field(default_factory=dict)
    jacobian_rank: int | None = None
    jacobian_rows: int = 0

    def __getitem__(self, block: str) -> BlockMeasures:
        """A block by name."""
        return {measures.name: measures for measures in self.blocks}[block]


def measure(
    module: nn.Module, X: Tensor, sets: Mapping[str, tuple[Tensor, Tensor]] | None = None, *,
    blocks: Sequence[str] | None = None, inputs: int = INPUTS, units: int = UNITS, threshold: float = THRESHOLD,
    loss: Loss = CROSS_ENTROPY, jacobian_inputs: int = 0, layers: Mapping[str, UnitLayer] | None = None,
    chunk: int = CHUNK, seed: int = 0,
) -> NetworkMeasures:  # fmt: skip
    """Every measure of one network, in eval mode (running statistics).

    Args:
        X: inputs, shape (n, ...), of which ``inputs`` (all where there are fewer) are looked at, and the first
            ``jacobian_inputs`` of these for the Jacobian of all outputs: one fixed subset, from the stream "measured".
        sets: samples (inputs, class numbers) by name on which the fit is stated.
        blocks, units, chunk, seed: see :func:`nets.features.block_features`.
        threshold: correlation above which two units are duplicates.
        layers: hidden layers whose neurons are counted; all of them, followed through the module, when None.

    Raises:
        ValueError: arguments that do not fit.
        DivergedError: a diverged network.

    Source: Andriushchenko et al. (2023), deep networks, and their code; Chen et al. (2023), Fig. 3, 4 and 6.
    """
    subset = measured_subset(X, inputs, seed)
    found = measure_blocks(
        module, subset, blocks, units=units, threshold=threshold, layers=layers, chunk=chunk, seed=seed
    )
    fits = {name: fit(module, *samples, loss=loss, chunk=chunk) for name, samples in (sets or {}).items()}
    if not jacobian_inputs:
        return NetworkMeasures(found, fits)
    part = subset[:jacobian_inputs]
    with evaluating(module), torch.no_grad():
        outputs = module(next(moved(module, part, 1))).shape[-1]
    return NetworkMeasures(found, fits, network_jacobian_rank(module, part, seed=seed), len(part) * outputs)


def measured_subset(X: Tensor, inputs: int, seed: int = 0) -> Tensor:
    """``inputs`` of the rows of X, drawn without replacement from the stream "measured"; X itself if it has no more."""
    if inputs < 1:
        raise ValueError(f"{inputs} inputs were asked for: choose 1 or more.")
    if inputs >= len(X):
        return X
    return X[torch.from_numpy(named_generator(seed, "measured").permutation(len(X))[:inputs]).to(X.device)]


def measure_blocks(
    module: nn.Module, X: Tensor, blocks: Sequence[str] | None = None, *, units: int = UNITS,
    threshold: float = THRESHOLD, layers: Mapping[str, UnitLayer] | None = None, chunk: int = CHUNK, seed: int = 0,
) -> tuple[BlockMeasures, ...]:  # fmt: skip
    """The measures of every block on all of X; arguments and errors are those of :func:`measure`."""
    for name, p in module.named_parameters():
        if not torch.isfinite(p).all():
            raise DivergedError(f"'{name}' has NaN or infinite entries, so the network has diverged: leave it out.")
    names = default_blocks(module, X) if blocks is None else tuple(blocks)
    features = block_features(module, X, names, units=units, chunk=chunk, seed=seed)
    return measures_of(module, features, threshold, layers)


def measures_of(
    module: nn.Module, features: Mapping[str, BlockFeatures], threshold: float = THRESHOLD,
    layers: Mapping[str, UnitLayer] | None = None,
) -> tuple[BlockMeasures, ...]:  # fmt: skip
    """The measures of blocks whose features are at hand, by name; arguments are those of :func:`measure`."""
    names, parameters = list(features), {name: p.detach() for name, p in module.named_parameters()}
    layers = hidden_layers(module, "published") if layers is None else layers
    owners = _owners(module, names, list(layers))
    counts = [
        LayerCount(name, int(independent_count(layer.vectors(parameters))), layer.units)
        for name, layer in layers.items()
    ]
    return tuple(
        _block(name, found, [c for c in counts if owners[c.name] == name], threshold)
        for name, found in features.items()
    )


def block_table(
    module: nn.Module, X: Tensor, blocks: Sequence[str] | None = None, *, units: int = UNITS,
    threshold: float = THRESHOLD, layers: Mapping[str, UnitLayer] | None = None, chunk: int = CHUNK, seed: int = 0,
) -> Tensor:  # fmt: skip
    """The measures of every block as numbers, shape (blocks, :data:`COLUMNS`), float64; NaN of a diverged network.

    For probes of a run that goes on. Arguments are those of :func:`measure_blocks`.
    """
    names = default_blocks(module, X) if blocks is None else tuple(blocks)
    try:
        found = measure_blocks(
            module, X, names, units=units, threshold=threshold, layers=layers, chunk=chunk, seed=seed
        )
    except DivergedError:
        return torch.full((len(names), len(COLUMNS)), math.nan, dtype=torch.float64)
    return table_of(found)


def table_of(found: Sequence[BlockMeasures]) -> Tensor:
    """Measures of blocks as the numbers of :func:`block_table`."""
    rows = [(b.sparsity, b.sampled_sparsity, b.distinct_sparsity, b.distinct, b.independent) for b in found]
    return torch.tensor(rows, dtype=torch.float64)


def _block(name: str, features: BlockFeatures, layers: Sequence[LayerCount], threshold: float) -> BlockMeasures:
    phi = features.activations
    kept, positive = distinct_units(phi, threshold, normalize=False), (phi > 0).sum(0).double() / phi.numel()
    return BlockMeasures(
        name, features.size, phi.shape[1], float(features.positive), float(positive.sum()),
        float(positive[kept].sum()), int(kept.sum()), tuple(layers),
    )  # fmt: skip


def _owners(module: nn.Module, blocks: Sequence[str], layers: Sequence[str]) -> dict[str, str]:
    """The block that each layer counts to: the first one that ends at the layer or after it; "" after the last."""
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    ends = sorted((max(order[n] for n in order if n == b or n.startswith(f"{b}.")), b) for b in blocks)
    owners = {}
    for name in layers:
        first = name.split(" + ")[0]
        if first not in order:
            raise ValueError(f"layer '{name}' is no part of the network: name it as in named_modules().")
        owners[name] = next((block for end, block in ends if end >= order[first]), "")
    return owners


@torch.no_grad()
def fit(module: nn.Module, X: Tensor, labels: Tensor, *, loss: Loss = CROSS_ENTROPY, chunk: int = CHUNK) -> Fit:
    """Mean loss and accuracy on inputs X (n, ...) with int64 class numbers (n,), in eval mode.

    Raises:
        ValueError: no samples, or labels that do not fit them.
        DivergedError: a loss that is NaN or infinite.
    """
    if labels.shape != X.shape[:1] or labels.dtype != torch.int64 or not len(X) or chunk < 1:
        raise ValueError(
            f"labels of {labels.dtype} and shape {tuple(labels.shape)} do not fit inputs {tuple(X.shape)} in chunks of "
            f"{chunk}: give one int64 class number per input, and 1 or more of each."
        )
    losses, right = [], []
    with evaluating(module):
        for x, y in zip(moved(module, X, chunk), labels.split(chunk), strict=True):
            outputs, y = module(x), y.to(x.device)
            losses.append(loss.values(outputs, y).double().sum())
            right.append((outputs.argmax(1) == y).sum())
    mean = float(torch.stack(losses).sum()) / len(X)
    if not math.isfinite(mean):
        raise DivergedError(f"the loss on {len(X)} samples is {mean}, so the network has diverged: leave it out.")
    return Fit(mean, int(torch.stack(right).sum()) / len(X), len(X))
