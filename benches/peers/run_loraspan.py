"""loraspan: ``compress(folders, rank=...)`` and ``save``.

A run for the inside (``--inside``) times what the stages are made of: the compiled passes over the factors, the top-k,
the opening of files. It is a run of its own, slot after slot, where the others have several at work at a time; the runs
that are compared carry no timers inside.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from job import Clock, Factors, main

import loraspan


def compress(folders: list[Path], rank: int, out: Path, clock: Clock) -> None:
    shares = Shares() if clock.inside else None
    start = time.perf_counter()

    def progress(stage: str, done: int, _total: int) -> None:
        # the first report comes when every file is open and nothing but headers is read
        if stage == "read" and done == 0:
            clock.stages["load"] = time.perf_counter() - start

    space = loraspan.compress(folders, rank=rank, progress=progress)
    clock.stages["fit"] = time.perf_counter() - start - clock.stages["load"]
    with clock("save"):
        space.save(out)
    if shares:
        clock.stages = shares.seconds | {"in all": time.perf_counter() - start}


def rebuild(out: Path, _folders: list[Path]) -> Iterator[tuple[str, dict[str, Factors]]]:
    space = loraspan.open(out)
    for name in space.tasks:
        slots = space.reconstruct(name).slots
        yield name, {path: (slot.down, slot.up, slot.scale) for path, slot in slots.items()}


class Shares:
    """Seconds inside named functions, each without what is spent in another of them that it calls."""

    def __init__(self) -> None:
        from loraspan import _core, adapters, store
        from loraspan.collection import abreast, bases, core_space, factors, ranges
        from loraspan.linalg import eig, roots

        abreast._MOST = 1
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._wrap("open files", adapters.read_all, adapters.check_together)
        for name in ("gram", "sparse_sketch", "combine"):
            self._wrap(f"pass: {name}", getattr(_core, name))
        self._wrap("top-k: power steps in the sketch", _core.power)
        self._wrap("top-k: eigenpairs", eig.top_eigenpairs)
        self._wrap("top-k: orthonormalize", roots.orthonormalize, ranges._orthonormal)
        self._wrap("small: joint refinement", core_space.refine_jointly, core_space.refine_products)
        self._wrap("small: cores", bases.shared_cores)
        self._wrap("small: roots", roots.gram_root)
        self._wrap("small: r x r Grams of all", factors.read_factors)
        self._wrap("save", store.save)

    def _wrap(self, label: str, *functions: Callable[..., Any]) -> None:
        for function in functions:
            timed = self._timed(label, function)
            for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "loraspan"]:
                for key, value in list(vars(module).items()):
                    if value is function:
                        setattr(module, key, timed)

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - start
                self.seconds[label] = self.seconds.get(label, 0.0) + took - self._inner.pop()
                self._inner[-1] += took

        return timed


if __name__ == "__main__":
    main(compress, rebuild)
