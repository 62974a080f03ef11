"""vlora 1.0.0 and lorashare 0.1.3 at several sizes: what each takes on disk, and the factors that come back.

Run by ``benches/fidelity.py`` in the peers' environment. vlora is kept in float32, with all its tensors in float16
(``to(dtype=)``), and with NF4 components (``save_quantized``).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import run_lorashare
import run_vlora
import torch
from job import Factors, say
from lorashare import SHAREModel
from safetensors.torch import save_file
from vlora import SharedSubspace, load_adapter

Rebuild = Callable[[Path, list[Path]], Iterator[tuple[str, Mapping[str, Factors]]]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("collection", type=Path, help="a folder of PEFT folders")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vlora", type=int, nargs="*", default=[])
    parser.add_argument("--lorashare", type=int, nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in options.collection.glob("*/adapter_config.json"))
    for peer, ranks, keep in (("vlora", options.vlora, _vlora), ("lorashare", options.lorashare, _lorashare)):
        for rank in ranks:
            try:
                for way, save, rebuild in keep(folders, rank):
                    _put(way, save, rebuild, folders, options.out)
            except Exception as error:
                # whatever a peer refuses a collection with
                say(way=peer, failed=f"{type(error).__name__}: {error}")
                break


def _vlora(folders: list[Path], rank: int) -> Iterator[tuple[str, Callable[[Path], None], Rebuild]]:
    names = [folder.name for folder in folders]
    space = SharedSubspace.from_adapters([load_adapter(f) for f in folders], task_ids=names, num_components=rank)
    yield f"vlora f32, {rank}", space.save, run_vlora.rebuild
    yield f"vlora NF4, {rank}", space.save_quantized, run_vlora.rebuild
    # last: it changes the space
    yield f"vlora f16, {rank}", space.to(dtype=torch.float16).save, run_vlora.rebuild


def _lorashare(folders: list[Path], rank: int) -> Iterator[tuple[str, Callable[[Path], None], Rebuild]]:
    model = SHAREModel.from_adapters({folder.name: str(folder) for folder in folders}, num_components=rank)
    yield f"lorashare, {rank}", model.save_pretrained, run_lorashare.rebuild


def _put(way: str, save: Callable[[Path], None], rebuild: Rebuild, folders: list[Path], out: Path) -> None:
    kept = out / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    save(kept)
    tensors = {}
    for i, (name, slots) in enumerate(sorted(rebuild(kept, folders))):
        assert name == folders[i].name
        for path, (down, up, scale) in slots.items():
            tensors[f"{i}.{path}.A"] = down.contiguous().clone()
            # in float64, where the scale rounds nothing
            tensors[f"{i}.{path}.B"] = scale * up.double()
    save_file(tensors, out / f"{way}.safetensors")
    nbytes = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    say(way=way, nbytes=nbytes, file=f"{way}.safetensors")


if __name__ == "__main__":
    main()
