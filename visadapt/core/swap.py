"""Base values that a method trains in place: kept beside the originals and exchanged when adapters are switched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError


class BaseValues:
    """Originals and trained values of base parameters, by adapter.

    Attributes:
        active: the adapter whose values stand in the network, None for the originals.
        originals: values of the untouched base, for every parameter that some adapter trains.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.originals: dict[str, Tensor] = {}
        self._trained: dict[str, dict[str, Tensor]] = {}

    def register(self, name: str, parameters: list[str], body: nn.Module) -> None:
        """Take an adapter in; its values start as the originals."""
        for key in parameters:
            if key not in self.originals:
                self.originals[key] = body.get_parameter(key).detach().clone()
        self._trained[name] = {key: self.originals[key].clone() for key in parameters}

    def forget(self, name: str, body: nn.Module) -> None:
        if name in self._trained:
            if self.active == name:
                self.activate([], body)
            for parameter in self.parameters(name, body):
                parameter.requires_grad_(False)
            del self._trained[name]
            used = {key for values in self._trained.values() for key in values}
            self.originals = {k: v for k, v in self.originals.items() if k in used}

    def parameters(self, name: str, body: nn.Module) -> list[nn.Parameter]:
        return [body.get_parameter(key) for key in self._trained.get(name, ())]

    @torch.no_grad()
    def activate(self, names: list[str], body: nn.Module) -> None:
        """Put the values of one adapter, or the originals, into the network.

        Raises:
            InputError: two adapters at once.
        """
        if len(names) > 1:
            raise InputError(f"adapters {names} both replace base values; enable one of them")
        name = names[0] if names else None
        if name == self.active:
            return
        if self.active is not None:
            for key in self._trained[self.active]:
                parameter = body.get_parameter(key)
                self._trained[self.active][key].copy_(parameter)
                parameter.copy_(self.originals[key])
        if name is not None:
            for key, value in self._trained[name].items():
                body.get_parameter(key).copy_(value)
        self.active = name

    def values(self, name: str, body: nn.Module) -> dict[str, Tensor]:
        """The adapter's trained values, wherever they stand at the moment."""
        if name == self.active:
            return {key: body.get_parameter(key).detach() for key in self._trained[name]}
        return self._trained.get(name, {})

    @torch.no_grad()
    def load(self, name: str, values: dict[str, Tensor], body: nn.Module) -> None:
        """Set the adapter's trained values."""
        for key, value in values.items():
            self._trained[name][key].copy_(value)
            if name == self.active:
                body.get_parameter(key).copy_(value)
