"""Have vlora and lorashare keep the adapters of ``benches/fidelity.py``, in an environment of their own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch.nn import functional

from _fidelity_cases import Factors
from _fidelity_ways import Kept
from compress_runs import PEERS
from loraspan.adapters import Adapter, peft
from loraspan.adapters.base import Slot

NAMES = ("vlora", "lorashare")
_LORASHARE = (1, 2, 4, 8, 12, 16, 32)


def peers(adapters: Sequence[Adapter], python: str) -> Iterator[Kept | tuple[str, str]]:
    """Give every point of both peers, or a peer's name and the words in which it refuses the collection."""
    # vlora takes a mean away and keeps it: one component less than adapters holds everything
    components = sorted({min(rank, len(adapters) - 1) for rank in (1, 2, 4, 8, 16, len(adapters) - 1)})
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        out.mkdir()
        _write_all(adapters, source)
        ranks = ["--vlora", *map(str, components), "--lorashare", *map(str, _LORASHARE)]
        command = [python, str(PEERS / "fidelity_peers.py"), str(source), str(out), *ranks]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        for line in answer.splitlines():
            # they print, too
            if line.startswith('{"way"'):
                said = json.loads(line)
                if "failed" in said:
                    yield said["way"], said["failed"]
                else:
                    yield Kept(said["way"], said["nbytes"], _read(out / said["file"], adapters))


def _read(file: Path, adapters: Sequence[Adapter]) -> list[Factors]:
    tensors = load_file(file)
    return [
        {path: (tensors[f"{i}.{path}.B"].double(), tensors[f"{i}.{path}.A"].double()) for path in adapter.slots}
        for i, adapter in enumerate(adapters)
    ]


def _write_all(adapters: Sequence[Adapter], folder: Path) -> None:
    """Write PEFT folders in float32, in the order of the adapters; zeros fill ranks up: both take one alone."""
    rank = max(slot.lora_rank for adapter in adapters for slot in adapter.slots.values())
    for i, adapter in enumerate(adapters):
        slots = {path: _padded(slot, rank) for path, slot in adapter.slots.items()}
        peft.write(Adapter(adapter.name, slots, {}, adapter.config), folder / f"{i:04d}")


def _padded(slot: Slot, rank: int) -> Slot:
    more = rank - slot.lora_rank
    down, up = functional.pad(slot.down.float(), (0, 0, 0, more)), functional.pad(slot.up.float(), (0, more))
    return Slot(down, up, slot.scale, slot.kind, slot.kernel)
