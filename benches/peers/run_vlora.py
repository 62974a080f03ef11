"""vlora 1.0.0, as its README says: load every adapter, ``SharedSubspace.from_adapters``, ``save``.

Its data matrix has one flattened adapter a row, so its components are per adapter and not per direction. float32 only:
with float16 or bfloat16 files its SVD raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from job import Clock, Factors, main
from vlora import SharedSubspace, load_adapter


def compress(folders: list[Path], rank: int, out: Path, clock: Clock) -> None:
    with clock("load"):
        adapters = [load_adapter(folder) for folder in folders]
    with clock("fit"):
        subspace = SharedSubspace.from_adapters(
            adapters, task_ids=[folder.name for folder in folders], num_components=rank
        )
    with clock("save"):
        subspace.save(out)


def rebuild(out: Path, folders: list[Path]) -> Iterator[tuple[str, dict[str, Factors]]]:
    subspace = SharedSubspace.load(out)
    for folder in folders:
        weights = subspace.reconstruct(folder.name)
        # alpha is not part of what it saves: its users give it again
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        yield folder.name, {path: (weights.lora_a[path], weights.lora_b[path], scale) for path in weights.layer_names}


if __name__ == "__main__":
    main(compress, rebuild)
