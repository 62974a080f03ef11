"""What is coded of a file: which of it there has to be, and that none unpacks to more than its bytes can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.beside import Beside
from loraspan.collection.coded import CODED_KIND, WEIGHTS, Coded, Stream, groups
from loraspan.collection.coding import MOST, Known
from loraspan.collection.weights import decode
from loraspan.errors import FormatError
from loraspan.store.format import DamagedError
from loraspan.store.mapped import TensorFile


def coded_rows(
    file: TensorFile,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    fields: Sequence[str],
    beside: Mapping[str, Beside],
) -> dict[str, dict[str, Coded]]:
    """Give the rows that streams of a file hold, by slot and field; none is unpacked yet.

    Args:
        file: of a segment, or of the bases.
        shapes: by slot and field: how many rows there have to be, of what length.
        fields: that may be coded, in the order of a stream.
        beside: what there is beside the rows of a slot, by the time when one is unpacked.

    Raises:
        FormatError: if the streams are not those that such slots have, or too short for what they are to hold.
    """
    streams = {name for name in file.names() if name.startswith(CODED_KIND)}
    if not streams:
        return {}
    wanted = {}
    for slot in sorted(shapes):
        sizes = {field: (shapes[slot][field][0], shapes[slot][field][1]) for field in fields}
        missing = {f: size for f, size in sizes.items() if 0 not in size and file.tensor(f"{f}.{slot}") is None}
        for field in missing:
            if file.tensor(scales := f"{field}_scales.{slot}") is not None:
                raise DamagedError(file.name, f"tensor {scales!r}", "coded rows have none beside them")
        if missing:
            wanted[slot] = missing
    found: dict[str, dict[str, Coded]] = {}
    for slots in groups(wanted):
        name = f"{CODED_KIND}{slots[-1]}"
        keys = [(slot, field) for slot in slots for field in wanted[slot]]
        stream = _stream(file, name, [wanted[slot][field] for slot, field in keys], partial(_known, beside, keys))
        streams.discard(name)
        for place, (slot, field) in enumerate(keys):
            found.setdefault(slot, {})[field] = Coded(stream, place, wanted[slot][field])
    if streams:
        raise DamagedError(file.name, f"tensor {min(streams)!r}", "no row is missing that it could hold")
    return found


def coded_weights(file: TensorFile, counts: Mapping[str, NDArray[np.int64]]) -> dict[str, Tensor]:
    """Give the weights that a file has in its stream of them, by slot.

    Args:
        file: of a segment.
        counts: by slot, of those with coded ends: columns of tasks, ``[T, 4]``.

    Raises:
        FormatError: if the stream is not that of the slots that have no weights of their own.
    """
    stream = file.tensor(WEIGHTS, torch.uint8)
    if stream is None:
        return {}
    wanted = {slot: counts[slot] for slot in sorted(counts) if file.tensor(f"{WEIGHTS}.{slot}") is None}
    problem = "it has to have one dimension, and weights that are missing elsewhere"
    try:
        if stream.ndim == 1 and wanted:
            return decode(stream.numpy().tobytes(), wanted)
    except FormatError as error:
        problem = str(error)
    raise DamagedError(file.name, f"tensor {WEIGHTS!r}", problem)


def _known(beside: Mapping[str, Beside], keys: Sequence[tuple[str, str]]) -> list[Known]:
    return [beside[slot].known()[field] for slot, field in keys if slot in beside]


def _stream(file: TensorFile, name: str, shapes: list[tuple[int, int]], known: Callable[[], list[Known]]) -> Stream:
    data = file.tensor(name, torch.uint8)
    numbers = sum(rows * length for rows, length in shapes)
    if data is None or data.ndim != 1 or numbers > MOST * data.numel():
        got = "it is missing" if data is None else f"it is {list(data.shape)}"
        raise DamagedError(
            file.name,
            f"tensor {name!r}",
            f"{numbers} numbers need a byte for {MOST} of them at the least; {got}",
        )

    # nothing local: what was opened can be pickled
    return Stream(data, shapes, partial(DamagedError, file.name, f"tensor {name!r}"), known)
