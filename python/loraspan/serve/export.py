"""Write tasks of a collection as adapters that other engines load: one rank and one scale where they want it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.adapters import peft
from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.collection import Collection
from loraspan.collection.rebuild import rebuild
from loraspan.errors import ArgumentError, UnsupportedError
from loraspan.serve.names import folder_names, read_index, write_index

# what vLLM's --max-lora-rank may be, less 1
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
ENGINES = ("vllm",)
Progress = Callable[[str, int, int], None]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_VLLM_KINDS = ("linear", "embedding")
_UNSET = ("modules_to_save", "trainable_token_indices", "lora_bias", "use_dora", "target_parameters")


@cpu_by_default
def export(
    collection: Collection,
    names: str | Sequence[str] | None,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rank_multiple: int | None = None,
    ranks: Sequence[int] | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write tasks as PEFT adapter folders.

    Args:
        collection: what holds them.
        names: of one task, which becomes ``folder`` itself; or of several, or None for all: each gets a folder in
            ``folder``, named by :func:`loraspan.serve.names.folder_name`, and ``tasks.json`` there says which is whose.
            An index that is there keeps its other tasks. One writer at a time.
        folder: to be made; earlier exports in it are replaced.
        dtype: of the factors: float32, bfloat16 or float16; None takes that of the originals.
        rank_multiple: pad all factors of a task with zeros to one rank, the least multiple of this.
        ranks: pad them to the least of these ranks that holds them.
        engine: ``"vllm"`` refuses what vLLM cannot take, and pads to :data:`VLLM_RANKS` where neither of the above
            says otherwise: vLLM has one scale for an adapter and no ``rank_pattern``.
        progress: called with ``"export"``, how many tasks are done, and how many there are.

    Returns:
        The folder of each task.

    Raises:
        UnknownTaskError: if there is no such task.
        ArgumentError: if an option is out of range, a task has more columns than ``ranks`` allows, or a folder holds
            something else.
        UnsupportedError: if the engine cannot take a task; says why. Nothing is written then.
        NotFiniteError: if a factor overflows ``dtype``.
        StoreError: if a folder cannot be written. What was written before an error stays, and is in the index.

    Example:
        >>> import tempfile
        >>> from loraspan import compress
        >>> space = compress([Adapter("SQL", {"q": Slot(torch.eye(3, 8), torch.eye(6, 3), 0.5)})], rank=3)
        >>> folder = export(space.collection, None, tempfile.mkdtemp(), rank_multiple=4)["SQL"]
        >>> folder.name, peft.read(folder).slots["q"].lora_rank
        ('SQL~u4cwurkwhhi4pxxm', 4)
    """
    chosen = [names] if isinstance(names, str) else _several(collection, names)
    fit = Fit(rank_multiple, ranks, engine)
    for name in chosen:
        fit.check(collection, name)
    root = Path(folder)
    if isinstance(names, str):
        adapter = fit.rebuild(collection, names, dtype)
        peft.write(adapter, root)
        return {names: root}
    return _write_all(collection, folder_names(chosen), root, fit, dtype, progress)


def _several(collection: Collection, names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [task.name for task in collection.tasks]
    return list(dict.fromkeys(names))


def _write_all(
    collection: Collection,
    folders: Mapping[str, str],
    root: Path,
    fit: Fit,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> dict[str, Path]:
    index = read_index(root)
    folder_names([*index, *folders])
    written: dict[str, Path] = {}
    try:
        for name, below in folders.items():
            adapter = fit.rebuild(collection, name, dtype)
            peft.write(adapter, root / below)
            written[name] = root / below
            rank = max(slot.lora_rank for slot in adapter.slots.values())
            index[name] = {"folder": below, "rank": rank, "base_model": adapter.source.base_model}
            if progress is not None:
                progress("export", len(written), len(folders))
    finally:
        if written:
            write_index(root, index)
    return written


class Fit:
    """What an export does to the ranks of a task, and which tasks it refuses.

    Args:
        rank_multiple: as :func:`export`.
        ranks: as :func:`export`.
        engine: as :func:`export`.
    """

    def __init__(self, rank_multiple: int | None, ranks: Sequence[int] | None, engine: str | None) -> None:
        if engine is not None and engine not in ENGINES:
            raise ArgumentError(f"export: engine is None or one of {', '.join(map(repr, ENGINES))}; got {engine!r}")
        if rank_multiple is not None and ranks is not None:
            raise ArgumentError("export: takes rank_multiple or ranks; got both")
        for rank in [rank_multiple] if ranks is None else ranks:
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise ArgumentError(f"export: ranks are whole numbers of at least 1; got {rank!r}")
        if ranks is not None and not ranks:
            raise ArgumentError("export: ranks needs at least one rank; got none")
        if engine == "vllm" and rank_multiple is None and ranks is None:
            ranks = VLLM_RANKS
        self._multiple, self._ranks, self._engine = rank_multiple, ranks, engine

    def check(self, collection: Collection, name: str) -> None:
        """Refuse a task that the engine cannot take.

        Raises:
            UnknownTaskError: if there is no such task.
            UnsupportedError: naming the task and what of it.
        """
        task = collection.task(name)
        if self._engine != "vllm":
            return
        config = task.config
        found = [f"{name} {str(config[name])[:80]}" for name in _UNSET if config.get(name)]
        if config.get("bias") not in (None, "none"):
            found.append(f"bias {config['bias']!r}")
        kinds = {path: collection.slots[path].kind for path in task.scales}
        found += [f"slot {path!r} of kind {kind!r}" for path, kind in kinds.items() if kind not in _VLLM_KINDS][:1]
        found += [f"tensor {key!r}" for key in sorted(task.extras)[:1] if not found]
        if found:
            raise UnsupportedError(
                f"export: vLLM cannot take task {task.name!r}, which has {', '.join(found)}: it takes factors of "
                "linear layers and embeddings, and nothing beside them. Serve it with loraspan.attach, or bake it into "
                "a copy of the base model with loraspan.bake"
            )

    def rebuild(self, collection: Collection, name: str, dtype: torch.dtype | None) -> Adapter:
        """Give a task as the adapter that is written: no slot without a column, and one rank where one is wanted.

        Raises:
            As :func:`export`.
        """
        task = collection.task(name)
        adapter = rebuild(collection, name, dtype=dtype or _DTYPES.get(task.factor_dtype, torch.float32))
        widest = max((slot.lora_rank for slot in adapter.slots.values()), default=0)
        common = self._common(name, max(widest, 1))
        return replace(
            adapter,
            slots={path: pad(slot, common or max(slot.lora_rank, 1)) for path, slot in adapter.slots.items()},
        )

    def _common(self, name: str, widest: int) -> int | None:
        if self._multiple is not None:
            return -(-widest // self._multiple) * self._multiple
        if self._ranks is None:
            return None
        fitting = [rank for rank in self._ranks if rank >= widest]
        if not fitting:
            raise ArgumentError(
                f"export: task {name!r} has {widest} columns in its widest slot, and ranks allows at most "
                f"{max(self._ranks)}: allow more (vLLM: --max-lora-rank too), or refit the space with a smaller rank"
            )
        return min(fitting)


def pad(slot: Slot, lora_rank: int) -> Slot:
    """Give the same ``dW`` with ``lora_rank`` columns, the further ones zero.

    Args:
        slot: with at most so many columns.
        lora_rank: how many the result has.

    Example:
        >>> pad(Slot(torch.ones(1, 3), torch.ones(2, 1), 0.5), 2).down
        tensor([[1., 1., 1.],
                [0., 0., 0.]])
    """
    more = lora_rank - slot.lora_rank
    if not more:
        return slot
    return replace(slot, down=_grown(slot.down, more, 0), up=_grown(slot.up, more, 1))


def _grown(factor: Tensor, more: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = more
    return torch.cat([factor, factor.new_zeros(shape)], dim)
