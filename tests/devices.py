"""The operators as tests call them, with tensors of the CPU, run on the device that a backend needs.

``from devices import gram`` instead of ``from loraspan.ops import gram``: where the named backend needs a GPU and there
is one, every tensor goes there in the storage it has (offset, strides and shared memory included), the operator runs,
and what it wrote and what it gives come back. Any other call goes straight through.
"""

import dataclasses
import functools
import os

import torch

from loraspan import ops
from loraspan.ops import Cores, Piece, RowBlocks

__all__ = ["Piece", "RowBlocks", "interpreting", "needs_device"]

OPERATORS = (
    "combine",
    "combine_many",
    "gram",
    "gram_many",
    "power",
    "power_many",
    "reconstruct",
    "reconstruct_many",
    "shared_lora",
    "shared_lora_",
    "sketch",
    "sketch_many",
)


def interpreting():
    """Whether Triton interprets its kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needs_device(backend):
    """Whether tensors have to be on a GPU for this backend; only asked where there is one."""
    return torch.cuda.is_available() and (backend == "cuda" or (backend == "triton" and not interpreting()))


class Trip:
    """Tensors of one call on their way to a device and back."""

    def __init__(self, device):
        self.device = device
        # of each CPU storage by address: itself and its copy; and the way back
        self.there = {}
        self.back = {}
        # of each tensor on the device by its id: itself, and the very one it was made of
        self.same = {}

    def go(self, value):
        """Give ``value`` with every tensor in it on the device."""
        if isinstance(value, torch.Tensor):
            return self._move(value) if value.device.type == "cpu" else value
        if isinstance(value, RowBlocks):
            return RowBlocks([self.go(block) for block in value.blocks], columns=value.columns)
        if isinstance(value, Cores) and not value.is_packed:
            tables = ("index", "weights", "left", "left_private", "right", "right_private")
            return dataclasses.replace(value, **{name: self.go(getattr(value, name)) for name in tables})
        return _inside(value, self.go)

    def _move(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.there:
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8).set_(storage).to(self.device)
            self.there[storage.data_ptr()] = (storage, copy)
            self.back[copy.untyped_storage().data_ptr()] = storage
        _, copy = self.there[storage.data_ptr()]
        moved = _view(copy.untyped_storage(), tensor, self.device).requires_grad_(tensor.requires_grad)
        self.same[id(moved)] = (moved, tensor)
        return moved

    def write(self):
        """Write back what the operator wrote to the tensors it was given."""
        for storage, copy in self.there.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).copy_(copy)

    def come(self, value):
        """Give ``value`` with every tensor in it on the CPU; one that was given to the operator is that very one."""
        if id(value) in self.same:
            return self.same[id(value)][1]
        if isinstance(value, torch.Tensor):
            storage = self.back.get(value.untyped_storage().data_ptr())
            return value.cpu() if storage is None else _view(storage, value, "cpu")
        return _inside(value, self.come)


def _view(storage, like, device):
    out = torch.empty(0, dtype=like.dtype, device=device)
    return out.set_(storage, like.storage_offset(), like.shape, like.stride())


def _inside(value, move):
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(move, value))
    return type(value)(map(move, value)) if isinstance(value, (list, tuple)) else value


def _sent(operator):
    @functools.wraps(operator)
    def call(*args, backend=None, **options):
        if not needs_device(backend):
            return operator(*args, backend=backend, **options)
        trip = Trip("cuda")
        args, options = trip.go(list(args)), {name: trip.go(value) for name, value in options.items()}
        out = operator(*args, backend=backend, **options)
        trip.write()
        return trip.come(out)

    return call


def __getattr__(name):
    if name in OPERATORS and hasattr(ops, name):
        return _sent(getattr(ops, name))
    raise AttributeError(name)
