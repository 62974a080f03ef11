"""Learn a task that the space does not have, by its coefficients alone: the bases stay as they are.

    python examples/train_loadings.py

Eleven of the sample adapters become one space. The twelfth task, digits in a mirror, is then learned twice in the very
same batches: from nothing, by a few coefficients on the bases of the other eleven, and from the coefficients of another
task, digits that are rotated. What was trained goes into the space, the other tasks keep every bit, and PEFT loads what
the space exports. Needs scikit-learn for the digits and peft, no network, and some seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

import loraspan
from loraspan.cli.demo_data import TASKS, accuracy, base_model, digits

HERE = Path(__file__).parent
BATCH, STEPS = 32, 100
LEARNED = {"from nothing": {"lora_rank": 8}, "like rotated": {"like": "shared-seed-rotated"}}


def mirrored(*, training: bool) -> tuple[Tensor, Tensor]:
    """Give the images and labels of the task."""
    data = digits(training=training)
    return TASKS["mirrored"](data.images, data.labels)


def main() -> None:
    folders = sorted((HERE / "adapters").glob("shared-seed-*"))
    space = loraspan.compress([folder for folder in folders if folder.name != "shared-seed-mirrored"], rank=24)
    print(space.summary, end="\n\n")
    for name, start in LEARNED.items():
        space.start(name, **start)
    numbers = space.ids(list(LEARNED))
    others = {name: space.reconstruct(name) for name in space.tasks if name not in LEARNED}

    served = loraspan.attach(base_model(HERE), space, train=True)
    # decay would shrink the loadings of every task, trained or not
    optimizer = torch.optim.AdamW(served.loadings().values(), lr=1e-2, weight_decay=0.0)
    images, labels = mirrored(training=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        # each image once for either task
        logits = served(images[rows].repeat(2, 1, 1), task_ids=numbers.repeat_interleave(BATCH))
        loss = functional.cross_entropy(logits, labels[rows].repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")

    space.keep(served, list(LEARNED))
    model = served.detach()
    images, labels = mirrored(training=False)
    print(f"\nmirrored digits, the base model: {accuracy(model, images, labels):.3f}")
    served = loraspan.attach(model, space)
    columns = {line.name: line for line in space.report().tasks}
    with tempfile.TemporaryDirectory() as made:
        for name in LEARNED:
            with served.tasks(name):
                right = accuracy(served, images, labels)
            space.export(name, Path(made, name))
            exported = PeftModel.from_pretrained(base_model(HERE), Path(made, name)).eval()
            print(
                f"learned {name}: {right:.3f}, in PEFT {accuracy(exported, images, labels):.3f}, "
                f"{columns[name].nbytes:,} bytes, stored within {space.errors[name]:.1e} of what was trained"
            )
    same = all(
        torch.equal(slot.up, space.reconstruct(name).slots[path].up)
        for name, adapter in others.items()
        for path, slot in adapter.slots.items()
    )
    print(f"the other {len(others)} tasks are {'bit for bit as they were' if same else 'changed'}")


if __name__ == "__main__":
    main()
