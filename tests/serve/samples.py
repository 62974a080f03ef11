"""Spaces of adapters that PEFT saved for small real models, and what PEFT makes of them."""

import contextlib

import torch

from adapters import models
from loraspan import compress
from loraspan.adapters import peft

QKV = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]}


def space_of(name, folder, configs, **options):
    """Compress adapters that PEFT saved for a model: one for each name of a task and its config."""
    for seed, (task, config) in enumerate(configs.items()):
        models.save_adapter(name, folder / task, seed=seed, **config)
    read = [peft.read(folder / task, name=task) for task in configs]
    return compress(read, **(options or {"max_error": 1e-5, "dtype": torch.float32}))


def merged(name, space, task, folder, **options):
    """Give the model that PEFT merges the task into, loaded from what the space exports."""
    peft.write(space.reconstruct(task), folder)
    with models.quiet():
        model = models.peft.PeftModel.from_pretrained(options.get("model") or models.build(name), folder)
        return model.merge_and_unload()


@contextlib.contextmanager
def untouched(model):
    """Fail unless the model has the same modules, tensors and bits as before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}
    held = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    yield
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == modules
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == held
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
