"""A stand-in for the parts of vLLM that an adapter and a resolver meet, written from its documentation and its source.

vLLM needs a GPU build and is not installed here. What this has of it: the fields of ``LoRARequest`` and its checks, the
abstract ``LoRAResolver``, the registry, what the OpenAI server does with a resolver, and what is checked of a folder
when it is loaded (vLLM 0.8 to 0.27).
"""

import abc
import asyncio
import json
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(eq=False)
class LoRARequest:
    """The fields of the msgspec struct; a request is its name."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict[str, Any] | None = None
    load_inplace: bool = False

    def __post_init__(self):
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"

    def __eq__(self, other):
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self):
        return hash(self.lora_name)


class LoRAResolver(abc.ABC):
    @abc.abstractmethod
    async def resolve_lora(self, base_model_name, lora_name):
        """Give a request, or None if the adapter cannot be found."""


class Registry:
    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name, resolver):
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name):
        return self.resolvers[resolver_name]


def modules():
    """Give fresh modules, as ``sys.modules`` would have them."""
    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver")
    made = {name: types.ModuleType(name) for name in names}
    made["vllm.lora.request"].LoRARequest = LoRARequest
    made["vllm.lora.resolver"].LoRAResolver = LoRAResolver
    made["vllm.lora.resolver"].LoRAResolverRegistry = Registry()
    return made


def registry():
    return sys.modules["vllm.lora.resolver"].LoRAResolverRegistry


class Refused(ValueError):
    """What vLLM says of a folder that it cannot load."""


def load(path, max_lora_rank=16):
    """Load a folder as a worker does: ``{module: (A, B, scale)}``."""
    folder = Path(path)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in config:
            raise Refused(f"Missing required configuration fields: {name}")
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise Refused("modules_to_save, DoRA or bias")
    assert max_lora_rank in RANKS
    if config["r"] > max_lora_rank:
        raise Refused(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}.")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    factors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.removeprefix("base_model.model.").split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            path, role = ".".join(parts[:-2]), parts[-2]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            path, role = ".".join(parts[:-1]), parts[-1].replace("embedding_", "")
        else:
            raise Refused(f"{key} is unsupported LoRA weight")
        # buffers [max_lora_rank, d] and [n, max_lora_rank] are written to without a further check
        assert tensor.shape[0 if role == "lora_A" else 1] <= max_lora_rank
        factors.setdefault(path, {})[role] = tensor
    return {path: (both["lora_A"], both["lora_B"], scale) for path, both in factors.items()}


class Server:
    """The OpenAI server: a name is resolved once, loaded, and loaded from its path again when the worker forgot it.

    Args:
        model: what it was started with.
        max_lora_rank: of its engine.
        max_cpu_loras: how many adapters its worker remembers.
    """

    def __init__(self, model, max_lora_rank=16, max_cpu_loras=2):
        self.model, self.max_lora_rank, self.max_cpu_loras = model, max_lora_rank, max_cpu_loras
        self.requests, self.worker, self.ids = {}, OrderedDict(), 0

    async def resolve(self, name):
        """Give the request for a name, 404 if no resolver knows it, 400 if it cannot be loaded."""
        if name in self.requests:
            return self.requests[name]
        self.ids += 1
        found = False
        for each in registry().get_supported_resolvers():
            request = await registry().get_resolver(each).resolve_lora(self.model, name)
            if request is None:
                continue
            found = True
            request.lora_int_id = self.ids
            try:
                self.add(request)
            except (Refused, OSError):
                continue
            self.requests[name] = request
            return request
        return 400 if found else 404

    def add(self, request):
        """What the worker does before each step with the adapter; an error here ends a real engine."""
        if request.lora_int_id not in self.worker:
            self.worker[request.lora_int_id] = load(request.lora_path, self.max_lora_rank)
            while len(self.worker) > self.max_cpu_loras:
                self.worker.popitem(last=False)
        self.worker.move_to_end(request.lora_int_id)
        return self.worker[request.lora_int_id]

    def ask(self, name):
        """Serve a request for a name: the factors that it runs with, or the status."""
        request = asyncio.run(self.resolve(name))
        return request if isinstance(request, int) else self.add(request)
