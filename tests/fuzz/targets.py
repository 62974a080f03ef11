"""What is done to spoilt files, one function a target: each gets a folder and may raise errors of loraspan only."""

import functools

from adapters.folders import adapter
from fuzz import strategies
from loraspan import compress, store
from loraspan.adapters import check_together, peft
from loraspan.adapters.check import find_not_finite
from loraspan.cli.export import folder_names
from loraspan.subspace import open as open_space

_FEW = 3


def opened(folder):
    """Open the store and look at all that it says."""
    held = store.open(folder / "team.span")
    for task in held.tasks:
        assert dict(task.scales).keys() == dict(task.lora_ranks).keys()
        repr((task.name, task.config, task.source, task.error))


def verified(folder):
    """Verify the store and print what is wrong."""
    for finding in store.verify(folder / "team.span"):
        assert str(finding)


def adapter_read(folder):
    """Read the adapter, and check it beside a good one."""
    bad = peft.read(folder / "bad")
    check_together([bad, *good()])
    find_not_finite(bad)


def compressed(folder):
    """Compress the adapter with two good ones, by a rank and by an error."""
    for goal in ({"rank": 2}, {"max_error": 0.3}):
        str(compress([folder / "bad", *good()], **goal).report())


def exported(folder):
    """Open the store, report on it, and export tasks of it into folders of their names."""
    space = open_space(folder / "team.span")
    str(space.report())
    chosen = space.tasks[:_FEW]
    for name, below in folder_names(chosen).items():
        space.export(name, folder / "out" / below)


def lived_in(folder):
    """Tell the history of the store and change it, each change on what the one before has left."""
    path = folder / "team.span"
    store.log(path)
    space = open_space(path)
    space.rename(space.tasks[0], "renamed") if space.tasks else None
    space.add([good()[0]], max_error=0.9)
    space.remove(space.tasks[0])
    space.refit(rank=1)
    store.gc(path, keep=0, grace=0)


def passed_on(folder):
    """Read the adapter and write it again."""
    peft.write(peft.read(folder / "bad"), folder / "out" / "bad")


@functools.cache
def good():
    """Two adapters that are in order, of the spoilt ones' model."""
    return [adapter("one", base="base"), adapter("two", base="base", path="layers.0.v")]


# each with the cases that it gets, and its share of a run: what it costs, and how much of a reader lies behind it
TARGETS = {
    "open": (opened, strategies.store_cases("open"), 30),
    "verify": (verified, strategies.store_cases("verify", strategies.NUMBERS), 15),
    "adapter": (adapter_read, strategies.adapter_cases("adapter"), 30),
    "compress": (compressed, strategies.adapter_cases("compress"), 5),
    "export": (exported, strategies.store_cases("export", strategies.NUMBERS), 10),
    "live": (lived_in, strategies.store_cases("live", strategies.NUMBERS, -1), 5),
    "rewrite": (passed_on, strategies.adapter_cases("rewrite"), 10),
}
