"""What every contender's process does: the timed job, or afterwards the measuring of what it saved.

A contender is a script that calls :func:`main` with two functions of its own. ``compress.py`` starts it twice: once to
compress (timed, watched from outside) and once with ``--measure`` (not timed). Nothing here imports loraspan.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]
"""``(down [r, d], up [n, r], scale)`` of one slot."""


class Clock:
    """Seconds per named stage; ``with clock("load")`` adds to a stage.

    Attributes:
        stages: what was told so far.
        inside: whether this run is for what lies inside the stages, and its times are not compared.
    """

    def __init__(self, inside: bool = False) -> None:
        self.stages: dict[str, float] = {}
        self.inside = inside

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start


def main(
    compress: Callable[[list[Path], int, Path, Clock], None],
    rebuild: Callable[[Path, list[Path]], Iterable[tuple[str, Mapping[str, Factors]]]],
) -> None:
    """Run one of the two modes and print one JSON object.

    Args:
        compress: ``(folders, rank, out, clock)``: the whole job, its stages told to the clock.
        rebuild: ``(out, folders)``: every task's name and factors by module path, from what was saved; the originals'
            folders only for a scale that the contender does not save.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("collection", type=Path, help="a folder of PEFT folders")
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapters", type=int, required=True, help="take the first so many folders by name")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help="measure the error of what out holds")
    parser.add_argument("--inside", action="store_true", help="time what runs inside the stages, if the contender can")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folders = sorted(path.parent for path in options.collection.glob("*/adapter_config.json"))[: options.adapters]
    if options.measure:
        say(event="error", **dw_errors(folders, rebuild(options.out, folders)))
        return

    say(event="ready", anonymous=anonymous_bytes("self"), torch=torch.__version__)
    clock = Clock(options.inside)
    before = sum(os.times()[:2])
    start = time.perf_counter()
    compress(folders, options.rank, options.out, clock)
    total = time.perf_counter() - start
    say(event="done", total=total, stages=clock.stages, processor=sum(os.times()[:2]) - before)


def say(**fields: object) -> None:
    """Print one JSON line to the process that watches."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def anonymous_bytes(pid: int | str) -> int:
    """Give a process's anonymous resident memory; pages of mapped files are not in it. Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def dw_errors(folders: list[Path], tasks: Iterable[tuple[str, Mapping[str, Factors]]]) -> dict[str, float]:
    """Give the worst and the mean relative Frobenius error of ``dW`` over the tasks, and the energy lost in all.

    A task's error is ``sqrt(sum ||dW - dW^||^2 / sum ||dW||^2)`` over its slots, from small float64 Grams.
    """
    rebuilt = dict(tasks)
    missing = {folder.name for folder in folders} ^ set(rebuilt)
    if missing:
        raise SystemExit(f"job: these tasks are not on both sides: {sorted(missing)[:3]}")
    errors, lost_all, norm_all = [], 0.0, 0.0
    for folder in folders:
        original, guess = read_peft(folder), rebuilt[folder.name]
        if set(original) != set(guess):
            others = sorted(set(original) ^ set(guess))
            raise SystemExit(f"job: {folder.name} came back with other modules: {others[:3]}")
        pairs = [_distance(original[path], guess[path]) for path in original]
        lost, norm = (sum(column) for column in zip(*pairs, strict=True))
        errors.append(math.sqrt(lost / norm))
        lost_all, norm_all = lost_all + lost, norm_all + norm
    return {"worst": max(errors), "mean": sum(errors) / len(errors), "energy_lost": lost_all / norm_all}


def _distance(original: Factors, guess: Factors) -> tuple[float, float]:
    """Give ``||dW - dW^||^2`` and ``||dW||^2``."""
    # the difference as one product, [up, up^] @ [s down; -s^ down^]: its Grams cancel inside one small product
    down = torch.cat([original[2] * original[0].double(), -guess[2] * guess[0].double()])
    up = torch.cat([original[1].double(), guess[1].double()], dim=1)
    grams = (up.T @ up) * (down @ down.T)
    r = original[0].shape[0]
    return max(float(grams.sum()), 0.0), float(grams[:r, :r].sum())


def read_peft(folder: Path) -> dict[str, Factors]:
    """Give the factors of a PEFT folder by module path: plain LoRA, one rank and one alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return plain_lora(tensors, scale)


def plain_lora(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Factors]:
    """Pair the tensors of a PEFT state dict."""
    prefix, down_end, up_end = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
    return {
        key.removeprefix(prefix).removesuffix(down_end): (down, tensors[key.removesuffix(down_end) + up_end], scale)
        for key, down in tensors.items()
        if key.endswith(down_end)
    }
