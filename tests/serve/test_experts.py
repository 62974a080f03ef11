"""Routed tokens keep their rows' tasks in stacked experts, however those are run."""

import types

import pytest
import torch
from torch import nn

import loraspan
import oracles
from adapters import models
from loraspan.collection.collection import SlotSpace
from loraspan.errors import LoraspanError, ShapeError, UnsupportedError
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


def build(name, implementation):
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


def layer_of(base, tables, path="mlp.experts"):
    """Serve made-up factors, ``up [n, 1] down [1, d]`` of one task each, named ``parameter[e]``."""
    made, spaces = {}, {}
    for name, (up, down) in tables.items():
        slot = f"{path}.{name}"
        task = loraspan.adapters.Adapter("task", {slot: loraspan.adapters.Slot(down, up, 1.0, "expert")})
        collection = loraspan.compress([task], max_error=1e-6, dtype=F32).collection
        spaces[slot] = collection.slots[slot]
        state = loraspan.serve.state.State(collection, {"task": 0}, 1)
        made[slot] = loraspan.serve.tables.SlotTables(slot, state, loraspan.serve.tables.Form(torch.device("cpu"), F32))
    return ServedExperts(base, path, made, spaces)


class Plain(nn.Module):
    """Experts of nobody's library, as the commonest are; ``num_experts`` is in the way of nothing."""

    sums = None

    def __init__(self, experts=3, hidden=6, between=5):
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(normal(1, experts, 2 * between, hidden, dtype=F32), requires_grad=False)
        self.down_proj = nn.Parameter(normal(2, experts, hidden, between, dtype=F32), requires_grad=False)
        self.act_fn = nn.SiLU()

    def gated(self, _, gate, up):
        return self.act_fn(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states, dtype=self.sums)
        for e in range(self.num_experts):
            place, tokens = torch.where((top_k_index == e).T)
            x = hidden_states[tokens]
            gate, up = nn.functional.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
            y = nn.functional.linear(self.gated(x, gate, up), self.down_proj[e])
            out.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(out.dtype))
        return out.to(hidden_states.dtype)


class Residual(Plain):
    """Adds what it was not asked for."""

    def gated(self, x, gate, up):
        return super().gated(x, gate, up) + x[:, :1]


class Nobody(Plain):
    """Hands tokens back that no expert is for."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        left = (top_k_weights * (top_k_index >= self.num_experts)).sum(-1, keepdim=True)
        return super().forward(hidden_states, top_k_index, top_k_weights) + left * hidden_states


class Wide(Plain):
    """Sums in float64, which is not to be seen in float32 where a token has two experts."""

    sums = torch.float64


class Other(nn.Module):
    """A module of transformers' shape, with something else inside."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(3, 4, 6)), nn.Parameter(torch.ones(3, 6, 2))

    def forward(self, hidden_states):
        return hidden_states @ self.gate_up_proj.sum(0).T


BATCH = (
    normal(3, 4, 6, dtype=F32),
    torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]]),
    torch.tensor([[0.5, 0.2], [0.7, 0.3], [1.5, 0.1], [0.25, 0.6]]),
)


def test_each_expert_has_its_own_factors():
    """Expert 1 alone is adapted, in both of its products; one token of a mixture, one of the task, one of none."""
    base = Plain()
    tables = {"gate_up_proj[1]": (normal(4, 10, 1, dtype=F32), normal(5, 1, 6, dtype=F32)),
              "down_proj[1]": (normal(6, 6, 1, dtype=F32), normal(7, 1, 5, dtype=F32))}  # fmt: skip
    layer = layer_of(base, tables)
    shares = torch.tensor([[1.0], [0.5], [7.0], [1.0]])
    rows = loraspan.serve.rows.Rows(torch.tensor([[0], [0], [-1], [0]]), shares)
    mark = layer.board.context.set(rows)
    actual = layer(*BATCH)
    layer.board.context.reset(mark)

    x, index, weights = (t.double() if t.is_floating_point() else t for t in BATCH)
    expected = torch.zeros_like(x)
    for token in range(4):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            share = float(shares[token]) * (expert == 1) * (token != 2)
            first, second = base.gate_up_proj[expert].double(), base.down_proj[expert].double()
            first = first + share * (tables["gate_up_proj[1]"][0] @ tables["gate_up_proj[1]"][1]).double()
            second = second + share * (tables["down_proj[1]"][0] @ tables["down_proj[1]"][1]).double()
            gate, up = (first @ x[token]).chunk(2)
            expected[token] += weight * (second @ (nn.functional.silu(gate) * up))
    # about thirty sums after each other, of terms that are up to eight times their sum, and the fit's error
    assert (actual - expected).abs().max() <= (30 * 8 * U32 + 4e-6) * expected.abs().max()
    assert oracles.same_bits(actual[2], base(*BATCH)[2])
    # a token that is sent nowhere is nobody's
    away = (BATCH[0], torch.full_like(BATCH[1], 3), BATCH[2])
    mark = layer.board.context.set(rows)
    assert not layer(*away).any()
    layer.board.context.reset(mark)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Residual(), "a Residual, .* its forward is not the loop"),
        (Nobody(), "a Nobody, .* tokens that it has no expert for"),
        (Wide(), "a Wide, .* its forward is not the loop"),
        (Other(), "a Other, .* its forward takes something else"),
        (nn.Linear(6, 4), "a Linear, .* no stacked parameters"),
        (nn.Module(), "a Module, .* no stacked parameters"),
    ],
)
def test_experts_that_do_something_else_are_refused_by_name(base, message):
    space = SlotSpace(torch.ones(10, 1), torch.ones(6, 1), "expert")
    with pytest.raises(UnsupportedError, match=message) as refused:
        ServedExperts(base, "layers.3.mlp.experts", {}, {"layers.3.mlp.experts.gate_up_proj[0]": space})
    assert "layers.3.mlp.experts" in str(refused.value)


def test_a_replaced_forward_is_refused():
    base = Plain()
    base.forward = lambda *batch: batch[0]
    with pytest.raises(UnsupportedError, match="replaced by another"):
        ServedExperts(base, "experts", {}, {})


@pytest.mark.parametrize("slot", ["gate_up_proj[3]", "down_proj[0]", "up_proj[0]", "gate_up_proj"])
def test_slots_that_fit_no_parameter_are_refused(slot):
    space = SlotSpace(torch.ones(10, 1), torch.ones(6, 1), "expert")
    fine = {"experts.gate_up_proj[2]": space, "experts[0]": space, "experts.base_layer[1]": space}
    ServedExperts(Plain(), "experts", {}, fine)
    if slot == "up_proj[0]":
        space = SlotSpace(torch.ones(5, 1), torch.ones(6, 1), "expert")
    with pytest.raises((ShapeError, UnsupportedError), match="experts"):
        ServedExperts(Plain(), "experts", {}, {**fine, f"experts.{slot}": space})


def test_what_runs_the_experts_is_known_or_refused(case):
    name, space, _ = case
    model = build(name, "eager")
    served = loraspan.attach(model, space)
    for module in model.modules():
        if isinstance(module, ServedExperts):
            module.base.config = types.SimpleNamespace(_experts_implementation="sonicmoe")
    with served.tasks("sql"), pytest.raises(UnsupportedError, match=r"experts run as 'sonicmoe'.*grouped_mm, batched"):
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


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(5, 3)}) for _ in range(2))


def test_experts_in_a_list_are_refused_by_name():
    one = loraspan.adapters.Adapter(
        "one", {"experts.1.w1": loraspan.adapters.Slot(torch.eye(1, 5), torch.eye(3, 1), scale=3.0)}
    )
    with pytest.raises(LoraspanError, match=r"experts\.1\.w1"):
        loraspan.attach(Listed(), loraspan.compress([one], rank=1))


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
