"""A hidden layer's units, and where the parameters that lead into them and out of them lie in a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Role = Literal["incoming", "bias", "norm", "outgoing"]
ROLES: tuple[Role, ...] = ("incoming", "bias", "norm", "outgoing")


@dataclass(frozen=True)
class Part:
    """A parameter, the axis of it that counts units (k entries each when it is k times as long), and what it does."""

    parameter: str
    role: Role
    axis: int
    ndim: int


@dataclass(frozen=True)
class UnitLayer:
    """One hidden layer's units.

    Attributes:
        name: the module that makes them, as in ``named_modules``; several joined by `` + `` where sums share units.
        units: how many.
        parts: where their parameters are, incoming first, outgoing last.
        norm: statistics that the units pass through: ``"none"``, ``"batch"`` for a unit's own (BatchNorm,
            InstanceNorm), ``"group"`` for those of several units (GroupNorm, LayerNorm); joined by ``+`` where sums
            or readers join units of several kinds, e.g. ``"batch+none"``; ``"ignored"`` where the published rule leaves
            out something that moves with the unit, so that no invariant set can be stated.
        groups: units of one of so many equal, consecutive groups share statistics and can be swapped.
        statistics: buffers with one entry a unit, such as a BatchNorm's running mean.
    """

    name: str
    units: int
    parts: tuple[Part, ...]
    norm: str = "none"
    groups: int = 1
    statistics: tuple[str, ...] = ()

    def vectors(self, parameters: Mapping[str, Tensor], roles: Sequence[Role] = ROLES) -> Tensor:
        """Every unit's entries side by side, shape (..., units, dim), of parameters (or gradients) (..., *shape)."""
        return torch.cat([self._rows(part, parameters) for part in self.parts if part.role in roles], -1)

    def _rows(self, part: Part, parameters: Mapping[str, Tensor]) -> Tensor:
        if part.parameter not in parameters:
            raise ValueError(f"layer '{self.name}' needs the parameter '{part.parameter}': give it with the others.")
        tensor = parameters[part.parameter]
        lead = tensor.shape[: tensor.ndim - part.ndim]
        return tensor.movedim(part.axis - part.ndim, -part.ndim).reshape(*lead, self.units, -1)

    def columns(self, parameters: Mapping[str, Tensor]) -> list[Role]:
        """The role of each column of :meth:`vectors`, given parameters (or anything) of the module's own shapes."""
        return [part.role for part in self.parts for _ in range(self._rows(part, parameters).shape[-1])]

    def write(self, module: nn.Module, vectors: Tensor) -> None:
        """Put vectors of shape (units, dim), all roles, back into a module's parameters."""
        own, at = dict(module.named_parameters()), 0
        if vectors.shape != self.vectors(own).shape:
            raise ValueError(
                f"vectors of shape {tuple(vectors.shape)} do not fit layer '{self.name}': give "
                f"{tuple(self.vectors(own).shape)}."
            )
        with torch.no_grad():
            for part in self.parts:
                parameter = own[part.parameter]
                moved = parameter.movedim(part.axis, 0).shape
                width = parameter.numel() // self.units
                block = vectors[:, at : at + width].reshape(moved)
                parameter.copy_(block.movedim(0, part.axis))
                at += width

    def index(self, module: nn.Module) -> Tensor:
        """Where :meth:`vectors` lie in the flat vector of the module's trainable parameters, (units, dim), int64.

        The flat vector is that of ``simulators.network.Network``: trainable parameters in order, each flattened.

        Raises:
            ValueError: a parameter of the layer that is not trained.
        """
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if frozen := [part.parameter for part in self.parts if part.parameter not in trained]:
            raise ValueError(f"'{frozen[0]}' of layer '{self.name}' is not trained: set requires_grad on it.")
        positions, first = {}, 0
        for name, p in trained.items():
            positions[name] = torch.arange(first, first + p.numel(), device=p.device).view(p.shape)
            first += p.numel()
        return self.vectors(positions)
