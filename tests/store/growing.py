"""Stores that grow generation by generation."""

import itertools
import os
import time
from dataclasses import replace

import torch

from loraspan import store
from loraspan.collection.collection import SlotSpace
from store.samples import ODD_EXTRAS, adding, collection, part_of, without

WHOLE = collection(1, tasks=12, extras=ODD_EXTRAS)
DAY = 24 * 3600.0


def part(first, last):
    """Some tasks of the sample, as a segment."""
    return part_of(WHOLE, first, last)


def begun(folder, *cuts):
    """A store of the first tasks in segments, opened."""
    path = folder / "team.span"
    segments = tuple(part(a, b) for a, b in itertools.pairwise(cuts))
    store.save(replace(WHOLE, segments=segments), path)
    return store.open_at(path)


def without_bases(n, d):
    """A slot whose tasks have nothing in common."""
    return SlotSpace(torch.zeros(n, 0), torch.zeros(d, 0))


def six_generations(folder):
    """A store of six generations, each with a segment that the next one lacks, all of them ten days old."""
    opened = begun(folder, 0, 2)
    for i in range(2, 7):
        gone = [f"task {i - 1}"] if i > 2 else []
        opened = store.commit(opened, adding(without(opened.collection, *gone), part(i, i + 1)))
    age(opened.folder, 10 * DAY)
    return opened.folder


def age(folder, seconds, pattern="*"):
    """Let files be of some age."""
    for path in folder.glob(pattern):
        os.utime(path, (time.time() - seconds,) * 2)


def generations(folder):
    """The generations that can be opened, the oldest first."""
    return [entry.generation for entry in store.log(folder) if entry.problem is None][::-1]
