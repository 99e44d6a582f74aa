"""Where a model holds a part, so that another one can take its place everywhere.

    model.a = model.b = linear        two names of one child: `forward` may use either
    ModuleList([linear, linear])      the same
    self.plain = [linear]             no child, but `self.plain[0](x)` runs it as well
    self.plain = (linear,)            cannot be changed: refused
    self.run = linear.forward         a bound method keeps its linear: refused

A float linear that stayed in one of these would go on computing, on channels that are in another order by then.
Objects of other classes, closures and globals are not searched.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

from pq_fx.errors import CalibrationError, PQError

# PyTorch's own, of which the last is searched apart.
_TABLES = ("_parameters", "_buffers", "_modules")

Place = tuple[Any, Any]  # a container and a key: container[key] is the part


class Places:
    """Where `model` holds each of its parts when this is made. Parts are told by identity and not kept alive."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[Place]] = {}
        # The attribute that holds a part in a way that cannot be changed.
        self._fixed: dict[int, str] = {}
        for name, module in model.named_modules():
            for child, part in module._modules.items():
                self._places.setdefault(id(part), []).append((module._modules, child))
            for key, value in vars(module).items():
                if key not in _TABLES:
                    self._search((module.__dict__, key), value, f"{name}.{key}".lstrip("."), set())

    def check(self, parts: Iterable[nn.Module], error: type[PQError] = CalibrationError) -> None:
        """Raise `error` where one of `parts` could not be replaced everywhere."""
        for part in parts:
            if id(part) in self._fixed:
                raise error(
                    f"{self._fixed[id(part)]} holds a {type(part).__name__} that is to be replaced, in a tuple, a set "
                    "or a bound method, which cannot be changed: it would go on computing with float weights, on "
                    "channels in another order. Keep it as a child of the module, or in a list or a dict"
                )

    def put(self, part: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever the model held `part`."""
        fill(self.of(part), new)

    def of(self, part: nn.Module) -> list[Place]:
        """Where the model held `part`."""
        return self._places.get(id(part), [])

    def _search(self, place: Place | None, value: Any, path: str, met: set[int]) -> None:
        """Parts in a plain attribute and in what it holds; `place` is None where it cannot be changed."""
        if isinstance(value, nn.Module):
            if place is None:
                self._fixed.setdefault(id(value), path)
            else:
                self._places.setdefault(id(value), []).append(place)
        elif isinstance(value, MethodType):
            self._fixed.setdefault(id(value.__self__), path)
        elif isinstance(value, (dict, list, tuple, set, frozenset)) and id(value) not in met:
            met.add(id(value))
            changeable = isinstance(value, (dict, list))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self._search((value, key) if changeable else None, item, path, met)


def fill(places: Iterable[Place], new: nn.Module | None) -> None:
    """Put `new` in each of these places."""
    for container, key in places:
        container[key] = new
