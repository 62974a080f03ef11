"""Tasks of a store in vLLM's own server and loader, where vLLM can be imported; an engine would take a GPU.

What is run of it: the registry and the class of resolvers, the OpenAI server's table of models, the request, and what a
worker reads of an adapter's folder. What an engine does then with the factors is not.
"""

import asyncio
import importlib
import importlib.util
import inspect
from types import SimpleNamespace
from typing import get_args

import pytest

from loraspan.serve import export
from loraspan.serve import vllm as plugin
from serve import vllm_stand_in
from serve.test_vllm import BASE, TASKS, is_task, space

__all__ = ["space"]


@pytest.fixture(scope="module")
def vllm():
    """The modules of vLLM that meet an adapter."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    names = {"config": "config.lora", "server": "entrypoints.openai.models.serving", "plugins": "plugins"}
    names |= {name: f"lora.{name}" for name in ("resolver", "request", "peft_helper", "lora_model")}
    try:
        return SimpleNamespace(**{name: importlib.import_module(f"vllm.{path}") for name, path in names.items()})
    except ImportError as error:
        pytest.skip(f"vLLM cannot be imported here: {error}")


class Worker:
    """What vLLM's worker does with an adapter's folder, without a device for its tensors."""

    model_config = SimpleNamespace(model=BASE, max_model_len=32)
    renderer = input_processor = None

    def __init__(self, vllm):
        self.vllm, self.loaded, self.numbers = vllm, {}, []
        self.config = vllm.config.LoRAConfig(max_lora_rank=8, lora_dtype="auto")

    async def add_lora(self, request):
        self.numbers.append(request.lora_int_id)
        helper = self.vllm.peft_helper.PEFTHelper.from_local_dir(request.lora_path, None)
        helper.validate_legal(self.config)
        model = self.vllm.lora_model.LoRAModel.from_local_checkpoint(
            request.lora_path, {"q", "v"}, helper, lora_model_id=request.lora_int_id, device="cpu"
        )
        self.loaded[request.lora_name] = {
            path: (both.lora_a, both.lora_b, both.scaling) for path, both in model.loras.items()
        }


def test_its_server_finds_loads_and_refuses(vllm, space, tmp_path, monkeypatch):
    registry = vllm.resolver.LoRAResolverRegistry
    monkeypatch.setattr(registry, "resolvers", {})
    # pages of memory are pinned for a device, and here may be none
    monkeypatch.setattr(vllm.lora_model, "PIN_MEMORY", False, raising=False)
    monkeypatch.setenv("LORASPAN_VLLM_STORE", str(space.path))
    monkeypatch.setenv("LORASPAN_VLLM_CACHE", str(tmp_path / "cache"))
    plugin.register()
    assert isinstance(registry.get_resolver("loraspan"), vllm.resolver.LoRAResolver)
    worker = Worker(vllm)
    models = vllm.server.OpenAIServingModels(
        worker, [vllm.server.BaseModelPath(name=BASE, model_path=BASE)], lora_modules=None
    )

    async def ask():
        return await asyncio.gather(*map(models.resolve_lora, (*TASKS, *TASKS, "nobody")))

    *requests, nobody = asyncio.run(ask())

    assert {type(request) for request in requests} == {vllm.request.LoRARequest}
    assert [request.lora_name for request in requests] == [*TASKS, *TASKS]
    assert len(worker.numbers) == len(TASKS)
    for name in TASKS:
        is_task(worker.loaded[name], space, name)
    assert nobody.error.code == 404


def test_it_finds_the_plugin(vllm, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert vllm.plugins.load_plugins_by_group("vllm.general_plugins")["loraspan"] is plugin.register


def test_its_interface_is_that_of_the_stand_in(vllm):
    assert get_args(vllm.config.MaxLoRARanks) == vllm_stand_in.RANKS
    assert set(export.VLLM_RANKS) < set(vllm_stand_in.RANKS)
    asked = [each.LoRAResolver.resolve_lora for each in (vllm.resolver, vllm_stand_in)]
    assert list(inspect.signature(asked[0]).parameters) == list(inspect.signature(asked[1]).parameters)
    assert all(map(inspect.iscoroutinefunction, asked))
    request = vllm.request.LoRARequest(lora_name="sql", lora_int_id=2**31 - 1, lora_path="x")
    theirs = vllm_stand_in.LoRARequest(lora_name="sql", lora_int_id=1, lora_path="y")
    assert (request.lora_name, request.lora_path) == (theirs.lora_name, "x")
    with pytest.raises(ValueError, match="id must be > 0"):
        vllm.request.LoRARequest(lora_name="sql", lora_int_id=0, lora_path="x")
