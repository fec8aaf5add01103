"""A convolutional network as a list of operations on buffers of numbers, read off its graph (``torch.fx``).

Images have their channels last, padded to eight; a linear layer is a convolution of images of one pixel. Where the
value of an operation is needed by nothing but the next one, both share a buffer, so that all a network holds for a
minibatch of small images stays in a core's cache.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from nets.compiled_elements import RELU, SIGMOID, TANH
from theory.lanes import LANES

CONVOLUTION, NORM, ACTIVATION, SUM, MEAN = range(5)
TOGETHER, GIVEN = 0, -1
OPERATION = np.dtype(
    [(name, np.int64) for name in (
        "kind", "x", "x_gradient", "x_again", "y", "y_gradient", "z", "z_gradient", "z_again", "x_pixels", "y_pixels",
        "x_channels", "y_channels", "inputs", "outputs", "weight", "bias", "taps", "forward", "backward", "by_tap",
        "function", "group", "spans", "own", "statistics",
    )] + [("epsilon", np.float64)]
)  # fmt: skip
"""One operation y = f(x) or x + z: buffers of values and gradients (-1: no gradient is wanted; ``_again``: there is one
already, to which it adds), sizes, places of weights in θ (-1: none), places of its tables of taps, its function or the
channels of a group (:data:`TOGETHER`: images are normalised together, in ``spans``; :data:`GIVEN`: by statistics in θ),
working memory of its own, statistics in a buffer or, the means before the variances, in θ."""

_ACTIVATIONS: dict[Any, int] = {
    nn.ReLU: RELU, nn.Tanh: TANH, nn.Sigmoid: SIGMOID, torch.relu: RELU, functional.relu: RELU, "relu": RELU,
    torch.tanh: TANH, functional.tanh: TANH, "tanh": TANH, torch.sigmoid: SIGMOID, functional.sigmoid: SIGMOID,
    "sigmoid": SIGMOID,
}  # fmt: skip
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FLAT = (torch.flatten, "flatten")
_MEANS = (torch.mean, "mean")


class UnknownModuleError(ValueError):
    """A module that is not made of operations known here, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the module has no compiled gradient, leave it to automatic differentiation: {reason}")


@dataclass(frozen=True)
class Held:
    """Where a pass leaves something: ``rows`` of ``stored`` numbers each, of which ``channels`` are real."""

    place: int
    rows: int
    stored: int
    channels: int


@dataclass(frozen=True)
class Plan:
    """What compiled loops need to run a network on minibatches of one size.

    Attributes:
        operations: in order, dtype :data:`OPERATION`.
        starts, products: the tables of taps one after the other: where the products of each pixel, or of each tap,
            begin, and their two offsets.
        size: numbers that the buffers hold.
        end: the network's outputs, a row an image.
        parts: outputs of the submodules that were asked for by name, a row a pixel.
        norms: BatchNorm's means and 1/√(v + ε) of the minibatch by name, and how many numbers they are of.
    """

    operations: np.ndarray
    starts: np.ndarray
    products: np.ndarray
    size: int
    end: Held
    parts: dict[str, Held]
    norms: dict[str, tuple[Held, int]]

    @property
    def outputs(self) -> int:
        """How many the network has."""
        return self.end.channels


@dataclass(frozen=True)
class _Value:
    """What a node of the graph holds; ``channels`` of which are real, ``image`` None once it is flat."""

    place: int
    gradient: int
    stored: int
    channels: int
    image: tuple[int, int]
    made_by: int  # kind of the operation, -1 for the images themselves


def plan(
    module: nn.Module, places: dict[str, int], images: int, shape: tuple[int, int, int], parts: Sequence[str] = (),
    spans: int = 1,
) -> Plan:  # fmt: skip
    """The plan for minibatches of so many images of shape (channels, height, width).

    Args:
        places: by name, where each parameter begins in θ, and where BatchNorm's running statistics do if it uses them.
        parts: submodules whose outputs are wanted.
        spans: so many minibatches, one after the other; BatchNorm normalises each by itself.

    Raises:
        UnknownModuleError: another operation, a parameter outside θ, other buffers, images that a layer does not take.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Exception as fault:  # whatever a module's code does when it meets a proxy
        raise UnknownModuleError(f"it cannot be traced ({fault}).") from fault
    if any(name not in places and not name.endswith("num_batches_tracked") for name, _ in module.named_buffers()):
        raise UnknownModuleError("it has buffers.")
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        raise UnknownModuleError("it has forward hooks, which may change what it computes.")
    wanted = {name: tracer.ends.get(name) for name in parts}
    return _Compiler(module, places, images, shape, wanted, spans).compiled(graph)


class _Tracer(fx.Tracer):
    """Remembers what each submodule puts out, if it runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = dict[str, fx.Node | None]()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out, name = super().call_module(m, forward, args, kwargs), self.path_of_module(m)
        self.ends[name] = None if name in self.ends else getattr(out, "node", None)
        return out


class _Compiler:
    def __init__(
        self, module: nn.Module, places: dict[str, int], images: int, shape: tuple[int, int, int],
        wanted: dict[str, fx.Node | None], spans: int,
    ) -> None:  # fmt: skip
        self._modules, self._places, self._shape = dict(module.named_modules()), places, shape
        self._spans, self._wanted, self._norms = spans, wanted, dict[str, tuple[Held, int]]()
        self._images, self._padded = images, -(-images // LANES) * LANES
        self._values: dict[fx.Node, _Value] = {}
        self._operations: list[dict[str, Any]] = []
        self._tables: dict[tuple[Any, ...], int] = {}
        self._starts, self._products = list[np.ndarray](), list[np.ndarray]()
        self._counted, self._size, self._used = [0, 0], 0, set[str]()

    def compiled(self, graph: fx.Graph) -> Plan:
        last = None
        for node in graph.nodes:
            if node.op == "output":
                last = node.args[0]
            elif node.op == "placeholder":
                channels, *image = self._shape
                place = self._new(self._padded * channels * math.prod(image))
                self._values[node] = _Value(place, -1, channels, channels, (image[0], image[1]), -1)
            else:
                self._values[node] = self._after(node)
        if self._used != set(self._places):
            raise UnknownModuleError("some of its parameters are used by no known layer.")
        end = self._values.get(last) if isinstance(last, fx.Node) else None
        if end is None or end.image != (1, 1) or end.made_by != CONVOLUTION or end.place != self._operations[-1]["y"]:
            raise UnknownModuleError("it does not end in a linear layer.")
        held = {name: self._values.get(node) if node is not None else None for name, node in self._wanted.items()}
        parts = {name: self._held(value) for name, value in held.items() if value is not None and value.made_by != -1}
        if len(parts) < len(self._wanted):
            raise UnknownModuleError("a part that was asked for does not put out one value a pass.")
        self._gradients()
        operations = np.zeros(len(self._operations), OPERATION)
        for row, fields in zip(operations, self._operations, strict=True):
            for name, number in fields.items():
                row[name] = number
        tables = np.concatenate(self._starts), np.concatenate(self._products)
        return Plan(operations, *tables, self._size, self._held(end), parts, self._norms)

    def _held(self, value: _Value) -> Held:
        return Held(value.place, self._images * math.prod(value.image or (1, 1)), value.stored, value.channels)

    def _after(self, node: fx.Node) -> _Value:
        part = self._modules[str(node.target)] if node.op == "call_module" else None
        sources = [self._values[source] for source in node.all_input_nodes]
        name = str(node.target)
        if _overwrites(node, part) and any(len(source.users) > 1 for source in node.all_input_nodes[:1]):
            raise UnknownModuleError(f"{node.op} {node.target} overwrites what others read.")
        if isinstance(part, nn.Conv2d | nn.Linear) and len(sources) == 1:
            return self._convolution(name, part, sources[0])
        if isinstance(part, nn.BatchNorm2d | nn.GroupNorm) and len(sources) == 1:
            return self._norm(node, name, part, sources[0])
        what: Any = type(part) if part is not None else node.target
        if len(sources) == 1 and what in _ACTIVATIONS:
            return self._in_place(node, ACTIVATION, sources[0], function=_ACTIVATIONS[what])
        if len(sources) == 2 and what in _SUMS and len(node.args) == 2 and not node.kwargs:
            return self._sum(node, *sources)
        if isinstance(part, nn.AdaptiveAvgPool2d) and part.output_size in (1, (1, 1)):
            return self._mean(sources[0])
        if what in _MEANS and len(sources) == 1 and _axes(node) in ((2, 3), (-2, -1), (-1, -2), (3, 2)):
            return self._mean(sources[0])
        if isinstance(part, nn.Identity):
            return sources[0]
        flat = isinstance(part, nn.Flatten) and part.start_dim == 1 and part.end_dim == -1
        if (flat or (what in _FLAT and node.args[1:] == (1,))) and sources[0].image == (1, 1):
            return sources[0]
        raise UnknownModuleError(f"it has an operation that is not known here: {node.op} {node.target}.")

    def _convolution(self, name: str, part: nn.Conv2d | nn.Linear, x: _Value) -> _Value:
        if isinstance(part, nn.Linear):
            kernel, stride, padding, inputs, outputs = (1, 1), (1, 1), (0, 0), part.in_features, part.out_features
            if x.image != (1, 1):
                raise UnknownModuleError(f"'{name}' reads images that are not flat.")
        else:
            plain = part.groups == 1 and part.dilation == (1, 1) and part.padding_mode == "zeros"
            if not plain or isinstance(part.padding, str):
                raise UnknownModuleError(f"'{name}' has groups, dilation or a padding that is not known here.")
            kernel, stride, padding = _pair(part.kernel_size), _pair(part.stride), _pair(part.padding)
            inputs, outputs = part.in_channels, part.out_channels
        taps, image = _taps(x.image, kernel, stride, padding)
        if inputs != x.channels or min(image) < 1:
            raise UnknownModuleError(f"'{name}' does not fit images of {x.channels} channels, {x.image}.")
        y = self._value(CONVOLUTION, outputs, image)
        K, key = math.prod(kernel), (x.image, kernel, stride, padding)
        self._add(
            kind=CONVOLUTION, x=x, y=y, inputs=inputs, outputs=outputs, taps=K, function=0,
            weight=self._parameter(f"{name}.weight"), bias=self._parameter(f"{name}.bias", part.bias is not None),
            forward=self._table((*key, 0, x.stored), taps, (1, 0, 2), math.prod(image), (x.stored, x.stored)),
            backward=self._table((*key, 1, y.stored), taps, (2, 0, 1), math.prod(x.image), (y.stored, y.stored)),
            by_tap=self._table((*key, 2, y.stored, x.stored), taps, (0, 1, 2), K, (y.stored // LANES, x.stored)),
            own=self._new(3 * K * max(x.stored, LANES) * y.stored + y.stored),
        )  # fmt: skip
        return y

    def _norm(self, node: fx.Node, name: str, part: nn.BatchNorm2d | nn.GroupNorm, x: _Value) -> _Value:
        running = isinstance(part, nn.BatchNorm2d) and part.running_mean is not None
        channels = part.num_features if isinstance(part, nn.BatchNorm2d) else part.num_channels
        if (running and part.training) or not part.affine or channels != x.channels or x.made_by == -1:
            raise UnknownModuleError(f"'{name}' has running statistics, no weights, or does not fit.")
        weight, bias = (self._parameter(f"{name}.{which}") for which in ("weight", "bias"))
        fields: dict[str, Any] = {"epsilon": part.eps, "weight": weight, "bias": bias}
        if running:
            mean, variance = (self._parameter(f"{name}.running_{which}") for which in ("mean", "var"))
            if variance != mean + channels:
                raise UnknownModuleError(f"the statistics of '{name}' do not lie one after the other.")
            own = self._new(2 * x.stored)
            return self._in_place(node, NORM, x, group=GIVEN, own=own, statistics=mean, **fields)
        group = x.channels // part.num_groups if isinstance(part, nn.GroupNorm) else TOGETHER
        spans = self._images if group else self._spans
        y, statistics = self._value(NORM, x.channels, x.image), self._new(2 * x.stored * spans)
        self._add(
            kind=NORM, x=x, y=y, inputs=x.channels, outputs=x.channels, group=group, spans=spans,
            own=self._new(8 * x.stored), statistics=statistics, **fields,
        )  # fmt: skip
        if group == TOGETHER:
            self._norms[name] = (Held(statistics, 2, x.stored, x.channels), self._images * math.prod(x.image))
        return y

    def _in_place(self, node: fx.Node, kind: int, x: _Value, z: _Value | None = None, **fields: Any) -> _Value:
        """An operation that overwrites its first source where nothing else needs it."""
        if x.made_by == -1:
            raise UnknownModuleError(f"{node.op} {node.target} reads the images themselves.")
        holders = [held for held, value in self._values.items() if value is x]
        readers = [user for held in holders for user in held.users]
        passed_on = [self._values.get(user) is x for user in readers]  # by the identity, or flattening
        alone = len(readers) - sum(passed_on) == 1 and x.made_by in (CONVOLUTION, NORM, SUM, MEAN)
        alone = alone and not any(held in self._wanted.values() for held in holders)
        y = replace(x, made_by=kind) if alone else self._value(kind, x.channels, x.image)
        self._add(kind=kind, x=x, y=y, z=z, inputs=x.channels, outputs=x.channels, **fields)
        return y

    def _sum(self, node: fx.Node, x: _Value, z: _Value) -> _Value:
        if (x.channels, x.image) != (z.channels, z.image) or z.made_by == -1 or x.place == z.place:
            raise UnknownModuleError("it adds values of different shapes, or the images themselves.")
        return self._in_place(node, SUM, x, z)

    def _mean(self, x: _Value) -> _Value:
        if x.made_by == -1:
            raise UnknownModuleError("it averages the images themselves.")
        y = self._value(MEAN, x.channels, (1, 1))
        self._add(kind=MEAN, x=x, y=y, inputs=x.channels, outputs=x.channels)
        return y

    def _add(self, kind: int, x: _Value, y: _Value, z: _Value | None = None, **fields: Any) -> None:
        row = {
            "kind": kind, "x": x.place, "x_gradient": x.gradient, "y": y.place, "y_gradient": y.gradient,
            "z": -1 if z is None else z.place, "z_gradient": -1 if z is None else z.gradient,
            "x_pixels": math.prod(x.image), "y_pixels": math.prod(y.image), "x_channels": x.stored,
            "y_channels": y.stored,
        }  # fmt: skip
        self._operations.append({**row, **fields})

    def _gradients(self) -> None:
        """Which gradients are added to what a later operation has left, in the order in which they are computed."""
        written = set[int]()
        for fields in reversed(self._operations):
            for source in ("z", "x"):
                place = fields[f"{source}_gradient"]
                again = place in written and place != fields["y_gradient"]
                fields[f"{source}_again"] = int(again)
                written.add(place)

    def _value(self, kind: int, channels: int, image: tuple[int, int]) -> _Value:
        stored = -(-channels // LANES) * LANES
        size = self._padded * stored * math.prod(image)
        return _Value(self._new(size), self._new(size), stored, channels, image, kind)

    def _new(self, size: int) -> int:
        place, self._size = self._size, self._size + -(-size // LANES) * LANES
        return place

    def _parameter(self, name: str, there: bool = True) -> int:
        if not there:
            return -1
        if name not in self._places or name in self._used:
            raise UnknownModuleError(f"'{name}' is not trained, or is used twice.")
        self._used.add(name)
        return self._places[name]

    def _table(
        self, key: tuple[Any, ...], taps: np.ndarray, columns: tuple[int, int, int], count: int, sizes: tuple[int, int]
    ) -> int:
        """Place of a table: taps sorted by one column, of ``count`` values, and the others as offsets."""
        if key not in self._tables:
            by, *others = columns
            taps = taps[np.argsort(taps[:, by], kind="stable")]
            starts = np.searchsorted(taps[:, by], np.arange(count + 1)) + self._counted[1]
            self._tables[key] = self._counted[0]
            self._starts.append(starts.astype(np.uint64))
            self._products.append((taps[:, others] * np.array(sizes)).astype(np.uint64))
            self._counted = [self._counted[0] + count + 1, self._counted[1] + len(taps)]
        return self._tables[key]


def _taps(
    image: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """(tap, output pixel, input pixel) of every product, (products, 3), none in the padding; the outputs' image size.

    >>> _taps((1, 3), (1, 3), (1, 1), (0, 1))[0].tolist()
    [[0, 1, 0], [0, 2, 1], [1, 0, 0], [1, 1, 1], [1, 2, 2], [2, 0, 1], [2, 1, 2]]
    """
    axes, outputs = [], []
    for n, k, s, p in zip(image, kernel, stride, padding, strict=True):
        m = (n + 2 * p - k) // s + 1
        tap, out = np.divmod(np.arange(k * max(m, 0)), max(m, 1))
        source = out * s + tap - p
        axes.append(np.stack([tap, out, source], 1)[(source >= 0) & (source < n)])
        outputs.append(m)
    rows, columns = axes
    first, second = rows.repeat(len(columns), 0), np.tile(columns, (len(rows), 1))
    return first * np.array([kernel[1], outputs[1], image[1]]) + second, (outputs[0], outputs[1])


def _overwrites(node: fx.Node, part: nn.Module | None) -> bool:
    """Whether an operation changes its first source."""
    named = isinstance(node.target, str) and node.op == "call_method" and node.target.endswith("_")
    return bool(getattr(part, "inplace", False) or node.kwargs.get("inplace") or node.target is operator.iadd or named)


def _axes(node: fx.Node) -> Any:
    """Over which axes a mean is taken."""
    given: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return tuple(given) if isinstance(given, list | tuple) else given


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, tuple) else (int(size), int(size))
