"""What every adapter file becomes in memory: one adapter, its slots and its extras."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

KINDS = ("linear", "embedding", "conv2d", "expert")


@dataclass(frozen=True)
class Slot:
    """The factors of one adapted map: ``dW = scale * up @ down``, ``[n, d]``.

    Attributes:
        down: ``[r, d]``, any floating dtype and strides; usually a view of a mapped file.
        up: ``[n, r]``, likewise.
        scale: a factor without unit, such as ``alpha / r``.
        kind: one of :data:`KINDS`: what the map is in the model, for whoever writes it out again. Whatever the kind,
            ``down`` and ``up`` are matrices: an embedding has ``d`` = vocabulary, a convolution ``d`` = cin * kh * kw.
        kernel: ``(cin, kh, kw)`` of a convolution, else None.
    """

    down: Tensor
    up: Tensor
    scale: float
    kind: str = "linear"
    kernel: tuple[int, int, int] | None = None

    @property
    def lora_rank(self) -> int:
        """The number of columns, ``r``."""
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, d)``: outputs and inputs of the map."""
        return (int(self.up.shape[0]), int(self.down.shape[1]))


@dataclass(frozen=True)
class Source:
    """Where an adapter came from, kept with its task.

    Attributes:
        path: as the user named it; empty if it never was a file; what it began as if it was trained in a space.
        header_sha256: of the header of its tensor file (names, shapes, dtypes, offsets), in hex.
        sha256: of the whole tensor file, if that was asked for.
        base_model: the name the adapter gives of its base model, if any.
        licence: the licence the adapter states, if any.
    """

    path: str = ""
    header_sha256: str = ""
    sha256: str | None = None
    base_model: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter.

    Attributes:
        name: the task's name; any text, never a path.
        slots: by module path, without the prefixes of the file format.
        extras: tensors that are kept byte for byte beside the factors (heads, biases, magnitudes), by the key that
            they have in the file.
        config: the original configuration, as plain JSON values.
        source: its provenance.
    """

    name: str
    slots: Mapping[str, Slot]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: Source = field(default_factory=Source)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors in their own dtypes, extras apart."""
        return sum(slot.down.nbytes + slot.up.nbytes for slot in self.slots.values())
