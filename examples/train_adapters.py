"""Train the sample adapters: twelve tasks on scikit-learn's 8 x 8 digits, each twice.

    python examples/train_adapters.py            # into examples/, a few minutes on two cores
    python examples/train_adapters.py -o FOLDER

A tiny transformer learns to read digits. Twelve LoRA adapters, written by PEFT itself, then teach it something that it
cannot do: parity, mirrored digits, shuffled patches, ... They differ in rank, alpha and how these are given.

``shared-seed-*`` and ``own-seed-*`` are the same twelve tasks. In the first, row j of a module's ``lora_A`` starts at
the same values in every adapter, as it does where a team trains with one seed; in the second every adapter draws its
own. All else is equal, the order of the images too. ``lora_B`` learns 16 times faster than ``lora_A`` (LoRA+, Hayou,
Ghosh, Yu 2024), so ``lora_A`` stays near where it started.

Needs ``pip install 'loraspan[test]'``. One thread per family, so that the core count does not change a result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional

from loraspan.cli.demo_data import FAMILIES, TASKS, Digits, accuracy, base_model, digits
from loraspan.cli.demo_model import TARGETS, DigitsTransformer

BATCH = 64
BASE_STEPS = 400
STEPS = 300
MAX_RANK = 16
LEARNING_RATE = 1e-2

# rank and alpha of each task, and whatever else its LoraConfig says
SETTINGS = {
    "parity": {"r": 4, "lora_alpha": 8},
    "at-least-5": {"r": 4, "lora_alpha": 12},
    "prime": {"r": 2, "lora_alpha": 6},
    "holes": {"r": 6, "lora_alpha": 12},
    "successor": {"r": 5, "lora_alpha": 10},
    "mirrored": {"r": 8, "lora_alpha": 16},
    "upside-down": {"r": 8, "lora_alpha": 12},
    "rotated": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "inverted": {"r": 10, "lora_alpha": 20},
    "noisy": {"r": 8, "lora_alpha": 16},
    "occluded": {"r": 8, "lora_alpha": 16, "rank_pattern": {"up": 4, "down": 4}, "alpha_pattern": {"up": 12}},
    "shuffled": {"r": 16, "lora_alpha": 24},
}


def train(model: torch.nn.Module, groups: list[dict], data: Digits, steps: int, seed: int) -> None:
    """Minimise the cross-entropy with AdamW, a short warm-up and a cosine."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.labels), (BATCH,), generator=generator)
        loss = functional.cross_entropy(model(data.images[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_base(folder: Path) -> None:
    """Teach the transformer to read digits; its weights are kept in float16."""
    torch.manual_seed(0)
    model = DigitsTransformer()
    train(model, [{"params": model.parameters(), "lr": 2e-3}], digits(training=True), BASE_STEPS, seed=0)
    path = folder / "base" / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    path.chmod(0o644)


def initialise(model: PeftModel, seed: int) -> None:
    """Draw ``lora_A`` as PEFT does, ``U(-1, 1) / sqrt(d)``, from ``seed`` and the module's name alone."""
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
            draw = torch.rand(MAX_RANK, weight.shape[1], generator=torch.Generator().manual_seed(key))
            weight.data.copy_((2 * draw[: len(weight)] - 1) / math.sqrt(weight.shape[1]))


def train_adapter(place: Path, family: str, task: str) -> float:
    """Train one adapter, write it to ``place/adapters/family-task`` and give its accuracy on the test images."""
    number = list(TASKS).index(task) + 1
    config = LoraConfig(target_modules=list(TARGETS), modules_to_save=["head"], **SETTINGS[task])
    torch.manual_seed(number)
    model = get_peft_model(base_model(place), config)
    initialise(model, seed=0 if family == "shared-seed" else number)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if ".lora_A." in name], "lr": LEARNING_RATE / 16},
        {"params": [p for name, p in named if ".lora_B." in name], "lr": LEARNING_RATE},
        {"params": [p for name, p in named if "modules_to_save" in name], "lr": LEARNING_RATE / 10},
    ]
    data = digits(training=True)
    train(model, groups, Digits(*TASKS[task](data.images, data.labels)), STEPS, seed=number)
    folder = place / "adapters" / f"{family}-{task}"
    model.save_pretrained(folder)
    tidy(folder)
    test = digits(training=False)
    return accuracy(PeftModel.from_pretrained(base_model(place), folder).eval(), *TASKS[task](test.images, test.labels))


def tidy(folder: Path) -> None:
    """Keep the two files of an adapter, the tensors in float16 and the configuration in a fixed order."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor.half() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "digits-transformer", "target_modules": sorted(config["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)
        if path.name not in {"adapter_config.json", "adapter_model.safetensors"}:
            path.unlink()


def train_family(place: Path, family: str) -> dict[str, float]:
    """Train the twelve adapters of one family on one thread."""
    torch.set_num_threads(1)
    accuracies = {}
    for task in TASKS:
        accuracies[task] = round(train_adapter(place, family, task), 4)
        print(f"{family}-{task}: {accuracies[task]:.3f}", flush=True)
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent)
    place = parser.parse_args().out
    torch.set_num_threads(1)
    train_base(place)
    with multiprocessing.get_context("spawn").Pool(len(FAMILIES)) as pool:
        accuracies = pool.starmap(train_family, [(place, family) for family in FAMILIES])
    found = dict(zip(FAMILIES, accuracies, strict=True))
    (place / "base" / "accuracies.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
