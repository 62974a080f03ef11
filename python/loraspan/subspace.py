"""What a user holds: a collection, made from adapters or opened from a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraspan import store
from loraspan.adapters import check_together, peft, read_all
from loraspan.adapters.base import Adapter
from loraspan.collection.collection import Collection
from loraspan.collection.fit import Goal, fit
from loraspan.collection.layout import collection_bytes
from loraspan.collection.rebuild import rebuild
from loraspan.collection.summary import Report, make_report, summarize
from loraspan.ops.places import find_device
from loraspan.store import Finding, verify

__all__ = ["Finding", "Report", "Subspace", "compress", "open", "verify"]


class Subspace:
    """A collection of adapters in one shared subspace per slot.

    Made by :func:`compress` or :func:`open`.

    Example:
        >>> import torch
        >>> from loraspan.adapters import Adapter, Slot
        >>> one = Adapter("one", {"q": Slot(torch.eye(2, 8), torch.eye(6, 2), scale=0.5)})
        >>> two = Adapter("two", {"q": Slot(2 * torch.eye(2, 8), torch.eye(6, 2), scale=0.5)})
        >>> space = compress([one, two], rank=2)
        >>> space.tasks, max(space.errors.values()) < 1e-6
        (['one', 'two'], True)
        >>> slot = space.reconstruct("two").slots["q"]
        >>> (slot.scale * slot.up @ slot.down)[0, 0].item()
        1.0
    """

    def __init__(self, collection: Collection, path: Path | None = None) -> None:
        self.collection = collection
        self.path = path

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order in which they came."""
        return [task.name for task in self.collection.tasks]

    @property
    def errors(self) -> dict[str, float]:
        """Every task's relative Frobenius error on ``dW`` over all its slots, rounding of what is stored included."""
        return {task.name: task.error for task in self.collection.tasks}

    @property
    def nbytes(self) -> int:
        """Bytes of all files of a generation that holds this collection: bases, columns, extras and records."""
        return collection_bytes(self.collection)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the factors of the original adapters, in their own dtypes."""
        return sum(task.factor_bytes for task in self.collection.tasks)

    @property
    def summary(self) -> str:
        """One sentence: how much the tasks share, which form was chosen, what it costs and loses."""
        return self.collection.summary

    def report(self) -> Report:
        """Give every task's error and bytes and every slot's form; ``str()`` of it is a table."""
        return make_report(self.collection, self.nbytes)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the collection to a folder, as a new store or, with ``overwrite``, a new generation of one.

        Args:
            path: the folder, by custom ``name.span``.
            overwrite: whether a store that is there may get a new generation.

        Raises:
            StoreError: if the folder is there and may not be written, or another writer was faster; nothing changes.
        """
        store.save(self.collection, Path(path), overwrite=overwrite)
        self.path = Path(path)

    def reconstruct(self, name: str, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """Give a task back as an adapter: balanced factors, scale 1, extras as they came.

        Args:
            name: of the task.
            dtype: of the factors: float32, bfloat16 or float16.

        Raises:
            UnknownTaskError: if there is no such task.
            ArgumentError: if ``dtype`` is none of those.
            NotFiniteError: if a factor overflows ``dtype``.
        """
        return rebuild(self.collection, name, dtype=dtype)

    def export(self, name: str, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a task as a PEFT adapter folder that PEFT loads.

        Args:
            name: of the task.
            folder: to be made.
            dtype: of the factors; ``None`` takes that of the original's factors.

        Raises:
            UnknownTaskError: if there is no such task.
            FormatError: if the folder is there already and is not an adapter.
        """
        task = self.collection.task(name)
        peft.write(self.reconstruct(name, dtype=dtype or _dtype_named(task.factor_dtype)), Path(folder))

    def __repr__(self) -> str:
        return f"Subspace({len(self.tasks)} tasks, {len(self.collection.slots)} slots, {self.nbytes:,} bytes)"


def compress(
    sources: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: torch.dtype = torch.float32,
    refine: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    hash_files: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Subspace:
    """Put adapters of one base model into a shared subspace. Give exactly one of rank, energy and max_error.

    Args:
        sources: adapter folders, globs, ``.safetensors`` files, Hub ids or :class:`Adapter` objects, one or a list; or
            a dict that names them.
        rank: width of every shared basis; every task is then a few coefficients.
        energy: share of the collection's energy to keep in shared bases, in every slot.
        max_error: relative error on ``dW`` that no task exceeds: shared columns where they pay, private ones for the
            rest. Any value can be met on any adapters, down to the rounding of ``dtype``.
        dtype: of what is stored: float32, bfloat16 or float16. Reported errors include its rounding.
        refine: iterations that fit both sides of a slot jointly.
        seed: of the random sketches.
        device: ``"cuda"`` or ``"mps"``: factors are sent there in chunks of columns, two at a time of 128 MB each,
            for every product with them, and small problems are solved on the CPU. ``None`` takes where they lie, the
            CPU for files. Metal has no float64, in which Grams and bases are summed: ``"mps"`` takes the rest.
        hash_files: keep a sha256 of every whole source file (its header's is always kept).
        progress: called with a stage, how much of it is done, and how much there is.

    Returns:
        A new space, in the CPU's memory; :meth:`Subspace.save` writes it.

    Raises:
        ArgumentError: if not exactly one goal is given, one is out of range, or there is no such device.
        FormatError: if a file is damaged; names file and tensor.
        UnsupportedError: if an adapter uses what would come out wrong.
        MismatchError: if adapters are of different base models, clash in shape, or share a name.
        NotFiniteError: if a factor holds a NaN or an infinity.

    Source:
        Share, arXiv 2602.06043; joint diagonalisation, arXiv 2407.00066.
    """
    goal = Goal(rank, energy, max_error, refine, dtype, seed)
    place = find_device("compress", device)
    adapters: Sequence[Adapter] = read_all(sources, hash_file=hash_files)
    check_together(adapters)
    collection = fit(adapters, goal, progress, place)
    nbytes = collection_bytes(collection)
    return Subspace(replace(collection, summary=summarize(collection, nbytes)))


def open(path: str | Path) -> Subspace:
    """Open a store. Tensors are mapped and read when they are needed.

    Args:
        path: the folder.

    Raises:
        StoreError: if there is no store.
        FormatError: if a file of it is damaged.
    """
    return Subspace(store.open(Path(path)), Path(path))


def _dtype_named(name: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
