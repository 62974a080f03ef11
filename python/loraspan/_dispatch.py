"""Choose the backend of an operator: the first that does not refuse, or exactly the one that is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from loraspan.errors import BackendError

Run = TypeVar("Run", bound=Callable[..., object])


@dataclass(frozen=True)
class Backend(Generic[Run]):
    """A name, the function it runs, and the reason it gives when it cannot."""

    name: str
    run: Run
    refuses: Callable[..., str | None]


def choose(operator: str, backends: Sequence[Backend[Run]], wanted: str | None, *args: object) -> Backend[Run]:
    """Give the first backend that takes ``args``, or exactly ``wanted`` if it is named."""
    for backend in backends:
        if wanted is None:
            if backend.refuses(*args) is None:
                return backend
        elif backend.name == wanted:
            if (reason := backend.refuses(*args)) is not None:
                raise BackendError(f"{operator}: backend {wanted!r} refuses this call: {reason}")
            return backend
    known = ", ".join(repr(backend.name) for backend in backends)
    raise BackendError(f"{operator}: no backend {wanted!r}; it has {known}")
