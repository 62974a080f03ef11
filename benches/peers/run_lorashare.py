"""lorashare 0.1.3, as its README says: ``SHAREModel.from_adapters`` on a dict of paths, ``save_pretrained``.

``from_adapters`` reads the files itself; the time inside its ``load_peft_adapter`` is told apart as the loading.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lorashare.model
from job import Clock, Factors, main, plain_lora
from lorashare import SHAREModel


def compress(folders: list[Path], rank: int, out: Path, clock: Clock) -> None:
    read = lorashare.model.load_peft_adapter

    def timed_read(*args: Any, **options: Any) -> Any:
        with clock("load"):
            return read(*args, **options)

    lorashare.model.load_peft_adapter = timed_read
    with clock("load and fit"):
        # a dict, not a list: with a list it reads every file twice, for the names first
        model = SHAREModel.from_adapters({folder.name: str(folder) for folder in folders}, num_components=rank)
    clock.stages["fit"] = clock.stages.pop("load and fit") - clock.stages["load"]
    with clock("save"):
        model.save_pretrained(out)


def rebuild(out: Path, _folders: list[Path]) -> Iterator[tuple[str, dict[str, Factors]]]:
    model = SHAREModel.from_pretrained(out)
    for name in model.all_loadings:
        meta = json.loads((out / "adapters" / name / "adapter_meta.json").read_text())
        config = meta["original_config"]
        yield name, plain_lora(model.reconstruct(name), config["lora_alpha"] / config["r"])


if __name__ == "__main__":
    main(compress, rebuild)
