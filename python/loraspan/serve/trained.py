"""What was trained in an attached model, task by task."""

from __future__ import annotations

from collections.abc import Sequence

from loraspan.collection.trained import Loadings
from loraspan.errors import ArgumentError, UnsupportedError
from loraspan.serve.layers import Layers


def trained_of(layers: Layers, names: str | Sequence[str] | None) -> dict[str, dict[str, Loadings]]:
    """Give copies of the loadings of tasks, by task and slot, on the CPU.

    Args:
        layers: of a model that is attached to be trained.
        names: of a task, or of several; None for all that are served.

    Raises:
        UnknownTaskError: if there is no such task.
        UnsupportedError: if the model does not serve a task; says why.
        ArgumentError: if ``names`` has another form, such as that of a mixture.
    """
    collection, numbers = layers.state.collection, layers.state.numbers
    wanted = list(numbers) if names is None else [names] if isinstance(names, str) else names
    if not isinstance(wanted, (list, tuple)) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise ArgumentError(
            f"keep: needs the name of a task, several, or None for all; got {names!r}. A mixture has no loadings: keep "
            f"each of its tasks, or train one that starts like one of them"
        )
    of_slots = {tables.path: tables for tables in layers.tables()}
    found = {}
    for name in wanted:
        task = collection.task(name)
        if name not in numbers:
            raise UnsupportedError(f"keep: this model does not serve task {name!r}: {layers.refused[name]}")
        found[name] = {path: of_slots[path].trained(numbers[name]) for path in task.scales}
    return found
