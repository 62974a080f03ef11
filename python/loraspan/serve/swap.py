"""Put layers in the place of modules of a model, and the modules back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from loraspan.serve.layer import Served
from loraspan.serve.match import Modules


class Swap:
    """The layers that took modules' places.

    Args:
        modules: of the model as it was.
    """

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self.layers: dict[str, Served] = {}

    def put(self, layers: Mapping[str, Served]) -> None:
        """Put layers in, wherever the model has the modules of these paths."""
        for path, layer in layers.items():
            self._set(path, layer)
        self.layers.update(layers)

    def undo(self) -> None:
        """Put the very modules back."""
        for path in self.layers:
            self._set(path, self._modules.by_path[path])
        self.layers = {}

    def _set(self, path: str, module: nn.Module) -> None:
        for parent, name in self._modules.places(path):
            parent._modules[name] = module
