"""Everything that loraspan raises on purpose, as one closed list.

Each message names the operator, file or adapter, the argument or tensor, what it needs, what it got and what to do.
"""


class LoraspanError(Exception):
    """The base of every error below."""


class ArgumentError(LoraspanError, ValueError):
    """An argument has a value that the call cannot take."""


class ShapeError(ArgumentError):
    """Shapes, dtypes or devices of tensors do not fit each other."""


class BackendError(LoraspanError, RuntimeError):
    """A backend that was asked for by name cannot run this call."""


class FormatError(LoraspanError, ValueError):
    """A file is not what it has to be: truncated, corrupt, or of another format."""


class UnsupportedError(LoraspanError, ValueError):
    """An adapter or a store uses something that would come out wrong, so it is refused."""


class NotFiniteError(LoraspanError, ValueError):
    """A tensor holds a NaN or an infinity."""


class MismatchError(LoraspanError, ValueError):
    """Adapters do not belong together: other base models, clashing shapes, or one name twice."""


class UnknownTaskError(LoraspanError, KeyError):
    """A collection has no task of that name."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class StoreError(LoraspanError, OSError):
    """A store cannot be written or read as it stands: locked, changed by another writer, or damaged."""
