"""loraspan: open a store and add adapters to it, one by one, each with its own commit."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from job import _distance, anonymous_bytes, read_peft, say

import loraspan
from loraspan.store import files


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--max-error", type=float, required=True)
    parser.add_argument("--no-sync", dest="sync", action="store_false", help="leave out fsync")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.sync:
        files.sync = files.sync_folder = lambda _: None

    say(event="ready", anonymous=anonymous_bytes("self"))
    start = time.perf_counter()
    space = loraspan.open(options.store)
    opened = time.perf_counter() - start
    seconds, written = [], []
    for folder in options.adapters:
        before = {path.name for path in options.store.iterdir()}
        start = time.perf_counter()
        space.add(folder, max_error=options.max_error)
        seconds.append(time.perf_counter() - start)
        written.append(sum(p.stat().st_size for p in options.store.iterdir() if p.name not in before))
    # the first one also warms up
    errors = [error(space, folder) for folder in options.adapters[1:]]
    say(event="done", open=opened, seconds=seconds[1:], written=written[1:], errors=errors)


def error(space: loraspan.Subspace, folder: Path) -> float:
    """Give the relative error on ``dW`` of what the store gives back, in float64."""
    original, slots = read_peft(folder), space.reconstruct(folder.name).slots
    pairs = [_distance(original[path], (slot.down, slot.up, slot.scale)) for path, slot in slots.items()]
    lost, norm = (sum(column) for column in zip(*pairs, strict=True))
    return float((lost / norm) ** 0.5)


if __name__ == "__main__":
    main()
