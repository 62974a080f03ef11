"""vlora 1.0.0: hold adapters in one subspace, then absorb others, one by one."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from job import _distance, anonymous_bytes, read_peft, say
from vlora import SharedSubspace, load_adapter

# its components are whole adapters: 16 of them weigh eight times what 32 directions do
COMPONENTS = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["absorb", "absorb_incremental"])
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--held", type=int, required=True, help="how many of them are held before the clock starts")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    anonymous = anonymous_bytes("self")
    held, new = options.adapters[: options.held], options.adapters[options.held :]
    subspace = SharedSubspace.from_adapters(
        [load_adapter(folder) for folder in held],
        task_ids=[folder.name for folder in held],
        num_components=COMPONENTS,
    )
    say(event="ready", anonymous=anonymous)
    seconds, errors = [], []
    for folder in new:
        start = time.perf_counter()
        getattr(subspace, options.method)(load_adapter(folder), folder.name)
        seconds.append(time.perf_counter() - start)
        errors.append(error(subspace, folder))
    say(event="done", seconds=seconds, errors=errors)


def error(subspace: SharedSubspace, folder: Path) -> float:
    """Give the relative error on ``dW`` of a task, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    original, weights = read_peft(folder), subspace.reconstruct(folder.name)
    pairs = [_distance(original[path], (weights.lora_a[path], weights.lora_b[path], scale)) for path in original]
    lost, norm = (sum(column) for column in zip(*pairs, strict=True))
    return float((lost / norm) ** 0.5)


if __name__ == "__main__":
    main()
