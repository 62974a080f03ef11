"""Adapters in files for runs in groups, and what such a run may be cut short by."""

from __future__ import annotations

import planted

import loraspan
from loraspan.adapters import peft
from loraspan.many import run as runs

COUNT = 24


def write(root, **options):
    """Adapters of ranks 3 to 5 in two slots with six shared directions, as PEFT folders; gives the adapters."""
    made = planted.adapters(**{"count": COUNT, **options})
    for i, adapter in enumerate(made):
        peft.write(adapter, root / f"{i:03d}")
    return made


def cut_by(size, monkeypatch):
    """Let groups have so many adapters, whatever they cost."""

    def cut(members, _cost, _limit):
        return [range(at, min(at + size, len(members))) for at in range(0, len(members), size)]

    monkeypatch.setattr(runs, "cut", cut)


def run(root, out, **options):
    """A run, within 1 GB and for ``max_error=0.05`` if nothing else is asked for; gives the space."""
    if not options.keys() & {"rank", "energy", "max_error"}:
        options["max_error"] = 0.05
    return loraspan.compress(root, out=out, **{"memory": "1GB", **options})


def files_of(out):
    """The names of a store's files, which have the hashes of what is in them."""
    return sorted(path.name for path in out.iterdir() if path.suffix == ".safetensors")
