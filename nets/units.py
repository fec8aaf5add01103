"""The units of every hidden layer of a module, with the parameters that lead into them and out of them.

A unit is what the next layer reads: a row of a linear layer, a channel of a convolution. Its outgoing weights are a
column of whatever layer reads it next, k columns a channel where a convolution's output is flattened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, fx, nn

from nets.unit_graph import UnitGraph
from nets.unit_layer import UnitLayer


def unit_vectors(
    module: nn.Module, rule: Literal["full", "published"] = "full", layers: Mapping[str, UnitLayer] | None = None
) -> dict[str, Tensor]:
    """Every hidden layer's unit vectors, (units, dim) by layer name, detached; see :func:`hidden_layers`."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    layers = hidden_layers(module, rule) if layers is None else layers
    return {name: layer.vectors(parameters) for name, layer in layers.items()}


def hidden_layers(module: nn.Module, rule: Literal["full", "published"] = "full") -> dict[str, UnitLayer]:
    """The hidden layers of a module by name, in the order in which they run.

    Args:
        module: made of Linear and Conv layers, normalisation, elementwise functions, pooling, flattening and sums.
        rule: ``"full"``: all parameters of a unit. Where a sum joins layers (a residual stream), channel c of all of
            them is one unit, with all the weights that write to it and all that read it: nothing less is invariant.
            ``"published"``: incoming weights, bias and the weights of the first layer that reads the unit later on;
            normalisation, skip connections and their convolutions left out, every other layer by itself.

    Raises:
        ValueError: a module that cannot be followed; build its :class:`UnitLayer` objects by hand then.

    Source: Chen et al. (2023), Fig. 3 and 4 (the published rule).
    """
    if rule not in ("full", "published"):
        raise ValueError(f"the rule '{rule}' does not exist: choose full or published.")
    try:
        graph = fx.Tracer().trace(module)
    except Exception as fault:
        raise ValueError(f"the module cannot be traced ({fault}): give its UnitLayer objects by hand.") from fault
    units = UnitGraph(module, graph)
    layers = units.published() if rule == "published" else units.full()
    if not layers:
        raise ValueError("no hidden layer was found: it takes a Linear or Conv layer whose output another one reads.")
    return {layer.name: layer for layer in layers}
