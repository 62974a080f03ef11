"""Ten thousand adapters on one small machine: memory, time by size, and errors checked against the originals.

    python benches/many.py --json benches/results/many.jsonl      # 10,000 adapters, 1.4 GB of them, some minutes
    python benches/many.py --adapters 400                         # a small one, seconds

Adapters are made from the seed and their number alone: 4 slots of 1024 x 1024, r = 8, float16; in each slot 32 shared
directions on each side under a decaying spectrum, and noise of each adapter's own. Every run is a new process with a
warm page cache. Memory is the peak of anonymous pages above that after the import, of the process and those it starts,
sampled from outside every 5 ms; pages of mapped files are not in it. The errors of a random sample of tasks are then
computed in float64 from the originals and compared with those that the store states. What was made is deleted at the
end, unless it is to be kept. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from _bench import machine, table, write_lines

SLOTS = [f"model.layers.{block}.self_attn.{name}" for block in range(2) for name in ("q_proj", "v_proj")]
SIZE, LORA_RANK, ALPHA = 1024, 8, 12
SHARED, DECAY, NOISE = 32, 0.95, 0.03
SEED = 20261122
CHECKED = 40
SAMPLE_SECONDS = 0.005
# the goal of this bench: peak anonymous memory above import for all 10,000
GOAL = 1.5e9

Record = dict[str, Any]


def main() -> None:
    options = _options()
    if options.child:
        _child(options)
        return
    sizes = [options.adapters] if options.only else [options.adapters // 4, options.adapters // 2, options.adapters]
    records = []
    try:
        _make(options.folder / "adapters", options.adapters)
        for count in sizes:
            records.append(_measure(count, options))
            print(json.dumps(records[-1]), file=sys.stderr)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    write_lines(options.json, records)
    columns = ("adapters", "source MB", "seconds", "s / GB", "processor s / GB", "memory MB", "disk MB", "worst")
    columns += ("worst checked", "off by")
    print(table(records, columns))
    print(f"goal: under {GOAL / 1e6:.0f} MB above import: {'met' if records[-1]['memory'] < GOAL else 'missed'}")


def _options() -> argparse.Namespace:
    folder = Path.home() / ".cache" / "loraspan-bench" / "many"
    parser = argparse.ArgumentParser(description="Compress more adapters than fit in memory, and measure it.")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--only", action="store_true", help="no runs over a quarter and a half of them")
    parser.add_argument("--memory", default="1GB", help="what the run may take")
    parser.add_argument("--max-error", type=float, help="0.1 by default")
    parser.add_argument("--rank", type=int, help="instead of --max-error")
    parser.add_argument("--jobs", type=int, default=1, help="processes; 1 runs without an executor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=folder, help=f"for adapters and outputs ({folder})")
    parser.add_argument("--keep", action="store_true", help="leave them there for the next run")
    parser.add_argument("--json", help="write one JSON line per size")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.max_error is None and options.rank is None:
        options.max_error = 0.1
    return options


def _make(root: Path, count: int) -> None:
    """Write the adapters that are missing."""
    root.mkdir(parents=True, exist_ok=True)
    # small things one after another: threads would only wait for each other
    torch.set_num_threads(1)
    directions = _directions()
    for i in range(count):
        folder = root / f"task-{i:05d}"
        if not (folder / "adapter_config.json").exists():
            folder.mkdir(exist_ok=True)
            save_file(_factors(directions, i), folder / "adapter_model.safetensors", metadata={"format": "pt"})
            # last: a folder with a config is a whole one
            (folder / "adapter_config.json").write_text(json.dumps(_CONFIG))


_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "example/small",
    "r": LORA_RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["q_proj", "v_proj"],
}


def _directions() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw ``U S`` and ``V S``, ``[1024, 32]``, of each slot."""
    generator = torch.Generator().manual_seed(SEED)
    spectrum = DECAY ** torch.arange(SHARED)

    def one() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(SIZE, SHARED, generator=generator))[0] * spectrum

    return [(one(), one()) for _ in SLOTS]


def _factors(directions: list[tuple[torch.Tensor, torch.Tensor]], index: int) -> dict[str, torch.Tensor]:
    """Draw an adapter: mixtures of the shared directions, noise, and a gauge of its own."""
    generator = torch.Generator().manual_seed(SEED + 1 + index)
    tensors = {}
    for path, (left, right) in zip(SLOTS, directions, strict=True):
        up, down = (
            _with_noise(side @ torch.randn(SHARED, LORA_RANK, generator=generator), generator) for side in (left, right)
        )
        gauge = torch.eye(LORA_RANK) + 0.3 * torch.randn(LORA_RANK, LORA_RANK, generator=generator)
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = (0.3 * torch.linalg.solve(gauge, down.T)).half().contiguous()
        tensors[f"{key}.lora_B.weight"] = (0.1 * up @ gauge).half().contiguous()
    return tensors


def _with_noise(factor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = NOISE * float(factor.norm()) / math.sqrt(factor.numel())
    return factor + size * torch.randn(factor.shape, generator=generator)


def _child(options: argparse.Namespace) -> None:
    """Do one run, and say when it begins and what came of it."""
    import loraspan

    torch.set_num_threads(options.threads)
    folders = [options.folder / "adapters" / f"task-{i:05d}" for i in range(options.child)]
    goal = {"rank": options.rank} if options.rank else {"max_error": options.max_error}
    _say({"event": "ready"})
    start, before = time.perf_counter(), _processor()
    with _executor(options) as executor:
        out = options.folder / "out.span"
        space = loraspan.compress(folders, **goal, memory=options.memory, executor=executor, out=out, overwrite=True)
    seconds = time.perf_counter() - start
    said = {"worst": max(space.errors.values()), "summary": space.summary}
    _say({"event": "done", "seconds": seconds, "processor": _processor() - before, **said})


def _processor() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def _executor(options: argparse.Namespace) -> Iterator[Executor | None]:
    if options.jobs == 1:
        yield None
        return
    import multiprocessing

    # fork would copy a process whose OpenMP pool is at work
    context = multiprocessing.get_context("spawn")
    threads = max(1, options.threads // options.jobs)
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (threads,)) as pool:
        yield pool


def _say(event: Record) -> None:
    print(json.dumps(event), flush=True)


def _measure(count: int, options: argparse.Namespace) -> Record:
    """Run over the first ``count`` adapters in a new process, and check what it wrote."""
    out = options.folder / "out.span"
    shutil.rmtree(out, ignore_errors=True)
    source = _warm(options.folder / "adapters", count)
    command = [sys.executable, __file__, *sys.argv[1:], "--child", str(count)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    )
    done, memory = _watch(child)
    worst, off = _check(out, options.folder / "adapters", count)
    return {
        "bench": "many",
        "adapters": count,
        "source MB": source / 1e6,
        "seconds": done["seconds"],
        "s / GB": done["seconds"] / (source / 1e9),
        "processor s / GB": done["processor"] / (source / 1e9),
        "memory": memory,
        "memory MB": memory / 1e6,
        "memory asked": options.memory,
        "disk MB": sum(path.stat().st_size for path in out.iterdir()) / 1e6,
        "worst": done["worst"],
        "worst checked": worst,
        "off by": off,
        "summary": done["summary"],
        "max_error": options.max_error,
        "rank": options.rank,
        "jobs": options.jobs,
        **machine(),
        "threads": options.threads,
    }


def _warm(root: Path, count: int) -> int:
    """Read every file once; give their bytes."""
    size, buffer = 0, bytearray(1 << 20)
    for i in range(count):
        with (root / f"task-{i:05d}" / "adapter_model.safetensors").open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                size += read
    return size


def _watch(child: subprocess.Popen[bytes]) -> tuple[Record, int]:
    """Read the child's events until it ends; give the last, and the peak of anonymous memory above the first."""
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    text, first, peak = b"", 0, 0
    while child.poll() is None:
        text += child.stdout.read() or b""
        if b"ready" in text:
            now = _anonymous(child.pid)
            first = first or now
            peak = max(peak, now)
        time.sleep(SAMPLE_SECONDS)
    text += child.stdout.read() or b""
    if child.returncode:
        raise SystemExit(f"many: the run failed with status {child.returncode}; its message is above")
    return json.loads(text.splitlines()[-1]), peak - first


def _anonymous(pid: int) -> int:
    """Anonymous memory of a process and of all that it has started."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            if line.startswith(b"RssAnon:"):
                total = 1024 * int(line.split()[1])
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _anonymous(int(child))
    return total


def _check(out: Path, root: Path, count: int) -> tuple[float, float]:
    """Give the worst error of a random sample in float64, and by how much the store's figures are off at most."""
    import loraspan

    space = loraspan.open(out)
    errors = space.errors
    worst = off = 0.0
    for i in random.Random(SEED).sample(range(count), min(CHECKED, count)):
        name = f"task-{i:05d}"
        from loraspan.adapters import peft

        original, stored = peft.read(root / name).slots, space.reconstruct(name).slots
        lost = size = 0.0
        for path, slot in original.items():
            delta = slot.scale * slot.up.double() @ slot.down.double()
            lost += float((delta - stored[path].up.double() @ stored[path].down.double()).square().sum())
            size += float(delta.square().sum())
        error = math.sqrt(lost / size)
        worst, off = max(worst, error), max(off, abs(error - errors[name]))
    return worst, off


if __name__ == "__main__":
    main()
