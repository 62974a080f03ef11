"""Bases and tasks as pieces of a ledger: they are the very files that a store has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loraspan.collection.collection import Segment, SlotSpace
from loraspan.collection.rows import tensors_of
from loraspan.many.aside import Aside
from loraspan.many.ledger import Pieces, encode, read_piece
from loraspan.many.members import Map
from loraspan.store.manifest import DataFile, Manifest, SlotShape
from loraspan.store.mapped import TensorFile
from loraspan.store.segment import read_basis, read_tasks, slot_shape, task_tensors


def encode_bases(spaces: Mapping[str, SlotSpace]) -> Pieces:
    """Give the bases of all slots as a file; slots without any are not in it."""
    named: list[tuple[str, Tensor]] = []
    for path, space in spaces.items():
        for side, basis, rank in zip("uv", (space.u, space.v), space.ranks, strict=True):
            named += tensors_of(side, path, basis) if rank else []
    return encode(named, {"ranks": {path: space.ranks for path, space in spaces.items()}})


def read_bases(path: Path, slots: Mapping[str, Map], dtype: torch.dtype) -> dict[str, SlotSpace]:
    """Map the bases of all slots; a slot may have none."""
    ranks = read_piece(str(path))[1]["ranks"]
    shapes = []
    for key, one in slots.items():
        k_out, k_in = ranks.get(key, (0, 0))
        shapes.append(SlotShape(key, one.n, one.d, k_out, k_in, one.kind, one.kernel))
    bases = read_basis(TensorFile(path.parent, _data(path)), _manifest(path, shapes, dtype))
    return {key: SlotSpace(*bases[key], one.kind, one.kernel) for key, one in slots.items()}


def encode_segment(segment: Segment, aside: Sequence[Aside]) -> Pieces:
    """Give the tasks of a group, and whom it has set aside, as a file."""
    return encode(task_tensors(segment), {"tasks": len(segment.tasks), "aside": aside})


def read_segment(path: Path, spaces: Mapping[str, SlotSpace], dtype: torch.dtype) -> tuple[Segment, list[Aside]]:
    """Map the tasks of a group, and give whom it has set aside."""
    _, notes = read_piece(str(path))
    aside = [Aside(*one) for one in notes["aside"]]
    data = _data(path, int(notes["tasks"]))
    shapes = [slot_shape(key, space) for key, space in spaces.items()]
    return read_tasks(TensorFile(path.parent, data), _manifest(path, shapes, dtype), data), aside


def _data(path: Path, tasks: int = 0) -> DataFile:
    return DataFile(path.name, "", path.stat().st_size, tasks)


def _manifest(path: Path, shapes: Sequence[SlotShape], dtype: torch.dtype) -> Manifest:
    """What reading a file asks of a manifest."""
    return Manifest(1, None, dtype, None, "", tuple(shapes), _data(path), ())
