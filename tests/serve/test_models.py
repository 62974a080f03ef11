"""Models of transformers, unmodified: what they say for a row with a task is what PEFT's say with that adapter."""

import numpy as np
import peft
import pytest
import torch

import loraspan
import oracles
import task_cores
from adapters import models
from loraspan.adapters import peft as files

ATTENTION = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "o_proj"]}
CONFIGS = {
    "llama": ATTENTION,
    "bert": {"r": 4, "lora_alpha": 10, "target_modules": ["query", "value", "output.dense"]},
    "gpt2": {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "mixtral": ATTENTION,
}
TASKS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """By name of a model a space of its adapters, the last with private columns, and folders that PEFT loads."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            for seed, task in enumerate(TASKS):
                models.save_adapter(name, folder / task, seed=seed, **CONFIGS[name])
            read = [files.read(folder / task, name=task) for task in TASKS]
            space = loraspan.compress(read[:2], rank=6)
            space.add(read[2], max_error=1e-3)
            for task in TASKS:
                files.write(space.reconstruct(task), folder / "back" / task)
            made[name] = space, folder / "back"
        return made[name]

    return make


def build(name):
    model = models.build(name)
    if name == "mixtral":
        # torch's grouped products have no float64
        model.config._experts_implementation = "eager"
    return model


def with_peft(name, folder, dtype=torch.float32):
    with models.quiet():
        return peft.PeftModel.from_pretrained(build(name), folder).to(dtype).eval()


def logits_of(model, **inputs):
    return model(input_ids=models.TOKENS, **inputs).logits


def stated(name, folder, served, number, row, count=18):
    """Some logits by their place, and how far off each may be in float32: what every slot's error makes of it.

    Of a slot it is what `shared_lora` states for its output, carried on by the derivative of the logit.
    """
    model, seen = with_peft(name, folder, torch.float64).requires_grad_(True), {}
    tables = {table.path: table for layer in served._layers for table in layer.all_tables()}
    for path, module in model.named_modules():
        if (slot := path.removeprefix("base_model.model.")) in tables:
            module.register_forward_hook(lambda _, x, y, slot=slot: seen.__setitem__(slot, (x[0], y)))
    logits = logits_of(model)[row].flatten()
    places = np.random.default_rng(0).permutation(len(logits))[:count]
    bound = np.zeros(len(places))
    for slot, (x, y) in seen.items():
        v, u, cores = tables[slot].now
        size = task_cores.delta(task_cores.absolute(cores), v.abs(), u.abs(), number)
        steps = len(v) + v.shape[1] + u.shape[1] + int(cores.index[number, 5:9].sum()) + 8
        error = steps * 2.0**-24 * (oracles.to_numpy(y.abs()) + oracles.to_numpy(x.abs()) @ size.T)
        for i, place in enumerate(places):
            (slope,) = torch.autograd.grad(logits[place], y, retain_graph=True)
            bound[i] += (oracles.to_numpy(slope.abs()) * error).sum()
    return places, bound


@pytest.mark.parametrize("name", CONFIGS)
def test_each_row_says_what_peft_says_with_its_adapter(team, name):
    space, folder = team(name)
    served = loraspan.attach(build(name), space)
    with torch.no_grad():
        base = logits_of(served)
    for rows in (["one", "three"], ["two", None]):
        with torch.no_grad(), served.tasks(rows):
            y = logits_of(served)
        for row, task in enumerate(rows):
            if task is None and name == "mixtral":
                # rows meet in experts: how many take one, which tasks change, says how its products are rounded
                with torch.no_grad():
                    exact = logits_of(build(name).double())
                assert float((y - base)[row].abs().max()) <= 2 * float((base.double() - exact)[row].abs().max())
                continue
            if task is None:
                assert oracles.same_bits(y[row], base[row])
                continue
            with torch.no_grad():
                theirs, exact = (
                    logits_of(with_peft(name, folder / task)),
                    logits_of(with_peft(name, folder / task, torch.float64)),
                )
                # what the rest of the model loses to float32, where weights are merged
                merged = logits_of(loraspan.bake(build(name), space, task))
            rest = float((merged.double() - exact)[row].abs().max())
            places, bound = stated(name, folder / task, served, int(space.ids(task)), row)
            off = (y.double() - theirs.double())[row].flatten()[places].abs().numpy()
            # ours and theirs, each with its own roundings
            assert (off <= 2 * (bound + rest)).all(), (off / (bound + rest)).max()
            assert float((y[row] - base[row]).abs().max()) > 100 * (bound.max() + rest)


def test_a_model_that_went_through_peft_keeps_its_adapter_and_serves_ours(team, tmp_path):
    space, _ = team("llama")
    models.save_adapter("llama", tmp_path / "mine", seed=9, r=3, lora_alpha=7, target_modules=["q_proj", "k_proj"])
    model = with_peft("llama", tmp_path / "mine", torch.float64)
    with torch.no_grad():
        theirs, keys = logits_of(model), set(peft.get_peft_model_state_dict(model))
        served = loraspan.attach(model, space)
        assert torch.equal(logits_of(served), theirs)
        with served.tasks(["two", None]):
            both = logits_of(served)
            with model.disable_adapter():
                alone = logits_of(model)
        assert set(peft.get_peft_model_state_dict(model)) == keys
        plain = loraspan.attach(models.build("llama").double(), space)
        with plain.tasks(["two", None]):
            assert torch.equal(logits_of(plain), alone)
        assert torch.equal(both[1], theirs[1])
        # both at once: the sum of their dW
        merged = loraspan.bake(with_peft("llama", tmp_path / "mine", torch.float64).merge_and_unload(), space, "two")
        # bake rebuilds factors in float32
        assert float((logits_of(merged) - both)[0].abs().max()) < 2.0**-24 * 64 * float(both.abs().max())
    assert type(served.detach().base_model.model.model.layers[0].self_attn.q_proj).__module__.startswith("peft.")


def test_a_whole_llama_is_one_graph(team):
    space, _ = team("llama")
    served = loraspan.attach(models.build("llama"), space)
    torch._dynamo.reset()
    compiled = torch.compile(served, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for names in (["one", None], ["three", "two"]):
            ids = space.ids(names)
            assert torch.equal(logits_of(compiled, task_ids=ids, use_cache=False), logits_of(served, task_ids=ids))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
