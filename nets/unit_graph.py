"""Following units through a module's graph (``torch.fx``): who writes them, who reads them; the module is not run."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional

from nets.unit_layer import Part, Role, UnitLayer

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OWN_STATISTICS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
_POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_FUNCTIONS = (
    "relu relu6 leaky_relu elu selu gelu silu mish tanh sigmoid softplus hardtanh hardswish dropout max_pool1d "
    "max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d"
)
_PASS: tuple[Any, ...] = (
    *(getattr(functional, name) for name in _FUNCTIONS.split()),
    torch.relu, torch.tanh, torch.sigmoid, torch.erf, torch.sin, torch.square, torch.abs, torch.mul,
    operator.mul, operator.truediv, operator.neg, operator.pow,
    "relu", "relu_", "tanh", "sigmoid", "erf", "square", "abs", "mul", "div", "pow", "neg", "contiguous", "clone",
)  # fmt: skip
_HAND = "give UnitLayer objects by hand."
_SPATIAL: tuple[Any, ...] = ((2, 3), [2, 3], (-2, -1), [-2, -1], (-1, -2), [-1, -2], 2, -1, [2], (2,))


@dataclass
class _Bundle:
    """Units that are one and the same: who writes them, who reads them, what they pass through on the way."""

    units: int
    writers: list[tuple[int, str]] = field(default_factory=list)  # (place in the order of execution, module)
    readers: list[tuple[int, str]] = field(default_factory=list)
    norms: list[tuple[int, str, str, int]] = field(default_factory=list)
    bare: bool = False  # some way from a writer to a reader or sum has no normalisation


@dataclass(frozen=True)
class _Flow:
    """What a value of the graph carries: which units, on which axis, whether normalised, why they were lost."""

    bundle: int
    axis: Literal["channels", "features", "flattened"]
    writer: str = ""  # the layer that made it, until a sum
    normalised: bool = False
    lost: str = ""


class UnitGraph:
    """The units of a traced module, joined where sums join them.

    Raises:
        ValueError: units that cannot be told apart on the way from one layer to the next.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._modules = dict(module.named_modules())
        self._parameters = dict(module.named_parameters())
        self._buffers = {name for name, buffer in module.named_buffers() if buffer is not None}
        self._bundles: list[_Bundle] = []
        self._same: list[int] = []  # bundle -> the bundle it has been joined to
        self._flows: dict[fx.Node, _Flow | None] = {}
        self._made: dict[str, int] = {}
        self._inputs: dict[str, fx.Node] = {}
        self._depth: dict[str, int] = {}
        self._shortcuts: set[str] = set()
        for order, node in enumerate(graph.nodes):
            flows = [flow for flow in map(self._flows.get, node.all_input_nodes) if flow]
            self._flows[node] = None if node.op in ("placeholder", "get_attr") else self._after(order, node, flows)

    def _after(self, order: int, node: fx.Node, flows: list[_Flow]) -> _Flow | None:
        part = self._modules[str(node.target)] if node.op == "call_module" else None
        what = node.target
        if isinstance(part, _LAYERS):
            return self._layer(order, node, part, flows)
        if not flows or what in ("size", "dim") or what is getattr:
            return None
        first = flows[0]
        if part is not None and type(part).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d")):
            return self._norm(order, str(what), part, first)
        if isinstance(part, (*_ELEMENTWISE, *_POOLING)):
            return first
        if isinstance(part, nn.Flatten) or what in (torch.flatten, "flatten", "reshape", "view", torch.reshape):
            return self._flat(node, part, first)
        if what in _SUMS and len(flows) > 1 and len(flows) == len(node.all_input_nodes):
            return self._sum(flows)
        if what in (torch.mean, "mean") and first.axis == "channels" and _arguments(node, 1, "dim") in _SPATIAL:
            return replace(first, axis="features")
        root, only_units = self._root(first.bundle), len(flows) == len(node.all_input_nodes)
        alone = all(self._root(flow.bundle) == root and flow.axis == first.axis for flow in flows)
        if (what in _PASS or what in _SUMS) and only_units and alone:
            return next((flow for flow in flows if flow.lost), first)
        return replace(first, lost=f"{node.op} {getattr(what, '__name__', what)}")

    def _layer(self, order: int, node: fx.Node, part: Any, flows: list[_Flow]) -> _Flow:
        name, linear = str(node.target), isinstance(part, nn.Linear)
        if not linear and part.groups != 1:
            raise ValueError(
                f"'{name}' is a convolution in groups, which units do not pass whole: list layers by hand."
            )
        for parameter in part._parameters:
            if part._parameters[parameter] is not None and f"{name}.{parameter}" not in self._parameters:
                raise ValueError(f"'{name}' shares its {parameter} with another layer: {_HAND}")
        for flow in flows:
            self._read(order, name, flow, part.in_features if linear else part.in_channels, linear)
        self._depth[name] = 1 + max((self._depth[f.writer] for f in flows if f.writer), default=self._deepest(flows))
        self._inputs[name] = self._source(node.all_input_nodes[0])
        if name not in self._made:
            self._made[name] = len(self._bundles)
            self._same.append(len(self._bundles))
            self._bundles.append(_Bundle(part.out_features if linear else part.out_channels, [(order, name)]))
        return _Flow(self._made[name], "features" if linear else "channels", name)

    def _source(self, node: fx.Node) -> fx.Node:
        """Where a value comes from before any norm, activation or pooling: a layer, a sum or the module's input."""
        while len(node.all_input_nodes) == 1:
            if node.op == "call_module" and isinstance(self._modules[str(node.target)], _LAYERS):
                break
            node = node.all_input_nodes[0]
        return node

    def _deepest(self, flows: list[_Flow]) -> int:
        roots = {self._root(flow.bundle) for flow in flows}
        return max((self._depth[name] for name, b in self._made.items() if self._root(b) in roots), default=0)

    def _read(self, order: int, name: str, flow: _Flow, size: int, linear: bool) -> None:
        bundle = self._bundles[self._root(flow.bundle)]
        whose = " + ".join(writer for _, writer in bundle.writers)
        if flow.lost:
            raise ValueError(f"the units of '{whose}' reach '{name}' through {flow.lost}, which may mix them: {_HAND}")
        fits = size % bundle.units == 0 if flow.axis == "flattened" else size == bundle.units
        if not fits or linear != (flow.axis != "channels"):
            raise ValueError(
                f"'{name}' reads {size} values from the {bundle.units} units of '{whose}' ({flow.axis}), and which "
                f"belong to which unit is not clear: {_HAND}"
            )
        bundle.readers.append((order, name))
        bundle.bare |= not flow.normalised

    def _norm(self, order: int, name: str, part: Any, flow: _Flow) -> _Flow:
        bundle = self._bundles[self._root(flow.bundle)]
        own, groups = isinstance(part, _OWN_STATISTICS), 1
        if isinstance(part, nn.GroupNorm):
            groups, own = part.num_groups, part.num_groups == part.num_channels
        elif isinstance(part, nn.LayerNorm):
            if part.normalized_shape[0] != bundle.units:
                return replace(flow, lost=f"the LayerNorm '{name}' over {tuple(part.normalized_shape)}")
        elif not own:
            return replace(flow, lost=f"the normalisation '{name}'")
        bundle.norms.append((order, name, "batch" if own else "group", 1 if own else groups))
        return replace(flow, normalised=True)

    def _flat(self, node: fx.Node, part: nn.Module | None, flow: _Flow) -> _Flow:
        if isinstance(part, nn.Flatten):
            plain = part.start_dim == 1 and part.end_dim == -1
        elif node.target in (torch.flatten, "flatten"):
            plain = _arguments(node, 1, "start_dim") == 1 and _arguments(node, 2, "end_dim") in (None, -1)
        else:  # reshape(n, -1)
            sizes = node.args[1:] if not isinstance(node.args[1], tuple | list) else node.args[1]
            plain = len(sizes) == 2
        if not plain:
            return replace(flow, lost=f"a reshape ({node.name}) that is not a flattening of everything but samples")
        return replace(flow, axis="flattened" if flow.axis == "channels" else flow.axis)

    def _sum(self, flows: list[_Flow]) -> _Flow:
        first, *others = flows
        for flow in others:
            mine, theirs = self._root(first.bundle), self._root(flow.bundle)
            lost = first.lost or flow.lost
            if not lost and (self._bundles[mine].units != self._bundles[theirs].units or first.axis != flow.axis):
                lost = "a sum of layers of different width"
            if lost:
                return replace(first, lost=lost)
            if mine != theirs:
                self._join(mine, theirs)
        for flow in flows:
            self._bundles[self._root(first.bundle)].bare |= not flow.normalised and bool(flow.writer)
            deeper = [f.writer for f in flows if f.writer and flow.writer and f.writer != flow.writer]
            deeper = [name for name in deeper if self._depth[name] > self._depth[flow.writer]]
            if deeper and sum(node is self._inputs[flow.writer] for node in self._inputs.values()) > 1:
                self._shortcuts.add(flow.writer)
        return _Flow(first.bundle, first.axis, normalised=True)

    def _join(self, mine: int, theirs: int) -> None:
        kept, gone = self._bundles[mine], self._bundles[theirs]
        for attribute in ("writers", "readers", "norms"):
            getattr(kept, attribute).extend(getattr(gone, attribute))
        kept.bare |= gone.bare
        kept.writers.sort()
        self._same = [mine if root == theirs else root for root in self._same]

    def _root(self, bundle: int) -> int:
        return self._same[bundle]

    def full(self) -> list[UnitLayer]:
        """One layer for each set of units that something reads, everything included."""
        bundles = [self._bundles[b] for b in set(self._same) if self._bundles[b].readers]
        return [self._full(bundle) for bundle in sorted(bundles, key=lambda bundle: bundle.writers[0])]

    def _full(self, bundle: _Bundle) -> UnitLayer:
        writers, readers = (
            list(dict.fromkeys(name for _, name in names)) for names in (bundle.writers, bundle.readers)
        )
        norms = [norm[1:] for norm in sorted(set(bundle.norms))]
        name = " + ".join(writers)
        if twice := set(writers) & set(readers):
            raise ValueError(f"'{twice.pop()}' writes and reads the same units: {_HAND}")
        parts = [self._part(f"{w}.weight", "incoming", 0) for w in writers]
        parts += [self._part(f"{w}.bias", "bias", 0) for w in writers if f"{w}.bias" in self._parameters]
        affine = [f"{norm}.{kind}" for norm, _, _ in norms for kind in ("weight", "bias")]
        parts += [self._part(parameter, "norm", 0) for parameter in affine if parameter in self._parameters]
        parts += [self._part(f"{r}.weight", "outgoing", 1) for r in readers]
        running = [f"{norm}.{kind}" for norm, _, _ in norms for kind in ("running_mean", "running_var")]
        kept = tuple(buffer for buffer in running if buffer in self._buffers)
        kinds = {kind for _, kind, _ in norms} | ({"none"} if bundle.bare or not norms else set())
        groups = max((groups for _, _, groups in norms), default=1)
        return UnitLayer(name, bundle.units, tuple(parts), "+".join(sorted(kinds)), groups, kept)

    def published(self) -> list[UnitLayer]:
        """One layer for each module that is no shortcut's, read by the first layer that reads its units later on."""
        layers = []
        for name, made in self._made.items():
            bundle = self._bundles[self._root(made)]
            order = next(place for place, writer in bundle.writers if writer == name)
            later = [reader for place, reader in sorted(bundle.readers) if place > order]
            if not later or name in self._shortcuts:
                continue
            parts = [self._part(f"{name}.weight", "incoming", 0)]
            parts += [self._part(f"{name}.bias", "bias", 0)] if f"{name}.bias" in self._parameters else []
            parts.append(self._part(f"{later[0]}.weight", "outgoing", 1))
            whole = not bundle.norms and len(bundle.writers) == len(bundle.readers) == 1
            layers.append(UnitLayer(name, bundle.units, tuple(parts), "none" if whole else "ignored"))
        return layers

    def _part(self, parameter: str, role: Role, axis: int) -> Part:
        return Part(parameter, role, axis, self._parameters[parameter].ndim)


def _arguments(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
