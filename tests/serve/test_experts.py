"""Routed tokens keep their rows' tasks in stacked experts, however those are run."""

import inspect
import types

import pytest
import torch

import loraspan
import oracles
from adapters import models
from loraspan.errors import UnsupportedError
from loraspan.serve.experts import ServedExperts
from matrices import normal
from oracles import BF16, F32
from serve.samples import space_of

transformers = pytest.importorskip("transformers")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
U32 = oracles.UNIT_ROUNDOFF[F32]
BOTH = {"r": 3, "lora_alpha": 10, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
ONE = {**BOTH, "target_parameters": EXPERTS[1:]}


def gpt_oss():
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    config = transformers.GptOssConfig(**sizes, **models.HEADS, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


def has_steps():
    """Whether transformers' own products of experts have a step after each, where tasks can enter."""
    from transformers.integrations import moe

    return "post_expert_norm" in inspect.getsource(moe)


def build(name, implementation):
    if implementation != "eager" and not has_steps():
        pytest.skip(f"{implementation} of transformers {transformers.__version__} has no step between its products")
    model = models.build(name)
    model.set_experts_implementation(implementation)
    return model


def outputs_by_token(model):
    with torch.no_grad():
        return model(input_ids=models.TOKENS).logits


@pytest.fixture(scope="module", autouse=True)
def _gpt_oss():
    models.BUILD["gpt-oss"] = gpt_oss
    yield
    del models.BUILD["gpt-oss"]


@pytest.fixture(scope="module", params=["mixtral", "gpt-oss"])
def case(request, tmp_path_factory):
    """A model, a space of tasks for it, and what PEFT makes of the tokens for each; one adapts one parameter only."""
    folder = tmp_path_factory.mktemp(request.param)
    space = space_of(request.param, folder, {"sql": BOTH, "legal": {**BOTH, "r": 2}, "chat": ONE})
    theirs = {}
    for task in space.tasks:
        space.export(task, folder / "out" / task)
        with models.quiet():
            model = models.peft.PeftModel.from_pretrained(models.build(request.param), folder / "out" / task).eval()
        theirs[task] = outputs_by_token(model)
    return request.param, space, theirs


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_is_peft(case, implementation):
    name, space, theirs = case
    model = build(name, implementation)
    base = outputs_by_token(model)
    served = loraspan.attach(model, space)
    assert oracles.same_bits(outputs_by_token(served), base)
    for tasks in (["sql", "chat"], [None, "legal"], ["chat", None], ["sql", "sql"]):
        with served.tasks(tasks):
            actual = outputs_by_token(served)
        for row, task in enumerate(tasks):
            # rows meet in the experts: where one is routed decides with how many another is multiplied, so that in a
            # whole model even those without a task may be rounded otherwise
            expected = (base if task is None else theirs[task])[row].double()
            assert task is None or (expected - base[row]).norm() > 0.05 * base[row].norm()
            # two float32 runs of a model of about a hundred sums, as in the tests of exported adapters
            assert (actual[row] - expected).norm() <= 100 * U32 * expected.norm()
    # a task for each token: causal, so that tokens before the first of another task are as if it were not there
    per = [["sql"] * 3 + ["legal"] * 5, [None] * 4 + ["chat"] * 4]
    with served.tasks(per, per="token"):
        actual = outputs_by_token(served)
    assert (actual[0, :3] - theirs["sql"][0, :3]).norm() <= 100 * U32 * theirs["sql"][0, :3].norm()
    assert (actual[1, :4] - base[1, :4]).norm() <= 100 * U32 * base[1, :4].norm()
    assert (actual[0, 3:] - theirs["sql"][0, 3:]).norm() > 1e-3 * actual[0, 3:].norm()


def test_what_runs_the_experts_is_known_or_refused(case):
    name, space, _ = case
    model = build(name, "eager")
    served = loraspan.attach(model, space)
    for module in model.modules():
        if isinstance(module, ServedExperts):
            module.base.config = types.SimpleNamespace(_experts_implementation="sonicmoe")
    known = "eager, grouped_mm, batched_mm: use" if has_steps() else "eager: use"
    with served.tasks("sql"), pytest.raises(UnsupportedError, match=f"experts run as 'sonicmoe'.* takes {known}"):
        outputs_by_token(served)


def test_compiles_whole_and_once(case):
    """With static shapes, whatever the routing is."""
    name, space, _ = case
    model = build(name, {"mixtral": "grouped_mm", "gpt-oss": "batched_mm"}[name])
    served = loraspan.attach(model, space)
    layer = next(module for module in model.modules() if isinstance(module, ServedExperts))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(x, index, weights, ids):
        layer.board.traced = loraspan.serve.rows.Rows(ids)
        try:
            return layer(x, index, weights)
        finally:
            layer.board.traced = None

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=False)
    x, weights = normal(1, 16, 32, dtype=F32), torch.rand(16, 2, generator=torch.Generator().manual_seed(1))
    for seed, tasks in enumerate((["sql", None], ["chat", "legal"])):
        ids = space.ids(tasks)
        index = torch.rand(16, 4, generator=torch.Generator().manual_seed(seed)).topk(2).indices
        with served.tasks(tasks):
            eager = layer(x, index, weights)
        actual = compiled(x, index, weights, ids)
        # the same sums in another order: of 32, 24 and a few more terms
        assert (actual - eager).norm() <= 100 * U32 * eager.norm()
    assert len(graphs) == 1


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tokens_without_a_task_have_the_bits_of_the_module(case, implementation, dtype):
    name, space, _ = case
    model = build(name, implementation).to(dtype)
    base = next(
        module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    )
    served = loraspan.attach(model, space)
    layer = next(module for module in model.modules() if isinstance(module, ServedExperts))
    assert layer.base is base
    x, weights = normal(1, 16, 32, dtype=dtype), torch.rand(16, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    index = torch.rand(16, 4, generator=torch.Generator().manual_seed(2)).topk(2).indices
    plain = base(x, index, weights)
    with served.tasks(["sql", None, "chat", None]):
        actual = layer(x, index, weights)
    for row in range(4):
        tokens = slice(4 * row, 4 * row + 4)
        if row % 2:
            assert oracles.same_bits(actual[tokens], plain[tokens])
        else:
            assert (actual[tokens] - plain[tokens]).norm() > 0.01 * plain[tokens].norm()
    assert oracles.same_bits(layer(x, index, weights), plain)
