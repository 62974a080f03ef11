"""What changes a store or a folder of an adapter, what a reader then sees, and who comes next."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner

from adapters.folders import adapter
from adapters.folders import write as write_adapter
from loraspan import compress, store
from loraspan.cli import main as command_line
from loraspan.errors import StoreError
from loraspan.subspace import open as open_space
from store.samples import files_named


@dataclass(frozen=True)
class Command:
    """A change of one folder.

    Attributes:
        prepare: makes the folder as it is before.
        run: makes the change.
        look: says all that a reader sees, and fails where something is not whole.
        follow: what the next writer does.
        strangers: gives the names of what should be gone after that.
        floor: it takes at least so many steps.
        tidy: when it fails with an error, it leaves nothing behind for the next writer to remove.
    """

    prepare: Callable[[Path], object]
    run: Callable[[Path], object]
    look: Callable[[Path], str]
    follow: Callable[[Path], object]
    strangers: Callable[[Path], list[str]]
    floor: int = 12
    tidy: bool = True


def named(*names, **options):
    """Small adapters of one model, different from each other."""
    made = []
    for seed, name in enumerate(names, 1):
        one = adapter(name, base="base", **options)
        scale = 1.0 + seed + len(name)
        slots = {path: dataclasses.replace(slot, up=slot.up * scale) for path, slot in one.slots.items()}
        extras = {"base_model.model.head": torch.arange(3.0) + seed}
        made.append(dataclasses.replace(one, slots=slots, extras=extras))
    return made


def team(folder, generations=1):
    """A store of three tasks, with a history."""
    space = compress(named("sql", "legal", "chat"), max_error=0.3)
    space.save(folder / "team.span")
    for i in range(generations - 1):
        space.rename(space.tasks[-1], f"chat {i}")
    return space


@functools.cache
def another(name, inputs=5):
    """A space of one task, made once: forked processes find it there."""
    return compress(named(name, d=inputs), max_error=0.3)


def opened(folder):
    return open_space(folder / "team.span")


def digest(value, into=None):
    """Give a checksum of all that is in a value, bit for bit."""
    whole = hashlib.sha256() if into is None else into
    if isinstance(value, torch.Tensor):
        whole.update(f"{value.dtype}{list(value.shape)}".encode())
        whole.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        whole.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            digest(field.name, whole)
            digest(getattr(value, field.name), whole)
    elif isinstance(value, Mapping):
        for key in value:
            digest(key, whole)
            digest(value[key], whole)
    elif isinstance(value, (list, tuple)):
        whole.update(f"{len(value)}[".encode())
        for each in value:
            digest(each, whole)
    else:
        whole.update(repr(value).encode())
    return whole.hexdigest()


def look_at_store(folder):
    """The current generation; every generation that the history names has to open, and nothing may be damaged."""
    path = folder / "team.span"
    if not (path / "CURRENT").exists():
        return "none"
    held = store.open(path)
    assert store.verify(path) == [], [str(finding) for finding in store.verify(path)]
    for entry in store.log(path):
        assert entry.problem is None, entry
        store.open(path, generation=entry.generation)
    return digest(held)


def strangers_in_store(folder):
    """Everything that no generation names."""
    path = folder / "team.span"
    if not path.exists():
        return []
    tables = [json.loads(manifest.read_text()) for manifest in path.glob("manifest-*")]
    data = files_named(*tables)
    known = data | {manifest.name for manifest in path.glob("manifest-*")} | {"CURRENT", ".lock", ".pins"}
    beside = {entry.name for entry in folder.iterdir()} - {"team.span", "in"}
    return sorted({entry.name for entry in path.iterdir()} - known | beside)


def rename_first(folder):
    """The next writer: a change that writes a manifest and nothing else."""
    space = opened(folder)
    space.rename(space.tasks[0], "renamed by the next writer")


def changed(change, **options):
    """A command on a store that is there."""
    run = lambda folder: change(opened(folder))  # noqa: E731
    return Command(lambda folder: team(folder, 2), run, look_at_store, rename_first, strangers_in_store, **options)


def sources(folder):
    for i, name in enumerate(("sql", "legal", "chat")):
        tensors = {key: tensor * (i + 1) for key, tensor in _factors().items()}
        write_adapter(folder / "in" / name, tensors)


def _factors():
    rng = torch.Generator().manual_seed(5)
    shapes = {"A": (2, 5), "B": (3, 2)}
    return {f"base_model.model.q.lora_{which}.weight": torch.randn(s, generator=rng) for which, s in shapes.items()}


def shell(*args):
    """Run the command line, and pass on what it fails with."""
    done = CliRunner().invoke(command_line, [str(arg) for arg in args])
    if done.exit_code:
        raise StoreError(done.output) if isinstance(done.exception, SystemExit) else done.exception


def compress_by_shell(folder):
    shell("compress", folder / "in", "-o", folder / "team.span", "--max-error", "0.3")


def compress_again(folder):
    shell("compress", folder / "in", "-o", folder / "team.span", "--max-error", "0.2", "--overwrite")


def begin_again(folder):
    """What follows on a first save that was cut short: the same once more, or a change if it was not."""
    if look_at_store(folder) == "none":
        compress_by_shell(folder)
    rename_first(folder)


def sources_and_team(folder):
    sources(folder)
    team(folder)


def compress_in_groups(folder):
    compress(folder / "in", max_error=0.3, memory="1GB", out=folder / "team.span")


def go_on_in_groups(folder):
    """The same call once more: it goes on where the first was cut short, or finds that all is done. Then a change."""
    done = look_at_store(folder) != "none"
    # of a run that was done, and not told so any more, only the store is known, which this call may not replace
    with contextlib.suppress(*[StoreError] if done else []):
        compress_in_groups(folder)
    rename_first(folder)


def collect(folder):
    store.gc(folder / "team.span", keep=0, grace=0)


def export(folder):
    another("legal").export("legal", folder / "out")


def export_twice(folder):
    another("sql", 7).export("sql", folder / "out")


def look_at_export(folder):
    """The two files of the one export or of the other, or no folder at all."""
    path = folder / "out"
    if not path.exists():
        return "none"
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(entry.name for entry in path.iterdir()) == names
    return digest([(path / name).read_bytes() for name in names])


def strangers_beside_export(folder):
    return sorted({entry.name for entry in folder.iterdir()} - {"out"})


def new_export(prepare, floor):
    return Command(prepare, export, look_at_export, export_twice, strangers_beside_export, floor)


COMMANDS = {
    "compress": Command(sources, compress_by_shell, look_at_store, begin_again, strangers_in_store),
    "compress --overwrite": Command(sources_and_team, compress_again, look_at_store, rename_first, strangers_in_store),
    # it keeps what is done, to go on from
    "compress in groups": Command(
        sources, compress_in_groups, look_at_store, go_on_in_groups, strangers_in_store, floor=30, tidy=False
    ),
    "save": changed(lambda space: another("new").save(space.path, overwrite=True)),
    "add": changed(lambda space: space.add(named("new", path="layers.1.q"), max_error=0.3)),
    "remove": changed(lambda space: space.remove("sql")),
    "rename": changed(lambda space: space.rename("sql", "../sql")),
    "replace": changed(lambda space: space.replace(named("legal"), max_error=0.3)),
    "refit": changed(lambda space: space.refit(rank=1)),
    "absorb": changed(lambda space: space.absorb(named("new"), max_error=0.3)),
    "rollback": changed(lambda space: store.rollback(space.path, 1)),
    # a generation that has lost its manifest does not come back: its files go with the next writer
    "gc": Command(
        lambda folder: team(folder, 4), collect, look_at_store, rename_first, strangers_in_store, floor=4, tidy=False
    ),
    "export": new_export(lambda _: None, 9),
    "export over an old one": new_export(export_twice, 12),
}
