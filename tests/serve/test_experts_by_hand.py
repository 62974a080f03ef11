"""Experts of nobody's library: the commonest form is served, what does something else is refused by name."""

import re

import pytest
import torch
from torch import nn

import loraspan
import oracles
from loraspan.collection.collection import SlotSpace
from loraspan.errors import LoraspanError, ShapeError, UnsupportedError
from loraspan.serve.experts import ServedExperts
from matrices import normal
from oracles import F32

U32 = oracles.UNIT_ROUNDOFF[F32]


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


def test_parameters_of_a_tasks_own_are_refused():
    """Such as the biases that PEFT saves of GPT-OSS: the loop here would pass them by."""
    slot = loraspan.adapters.Slot(normal(5, 1, 6, dtype=F32), normal(4, 10, 1, dtype=F32), 1.0, "expert")
    extras = {"base_model.model.experts.down_proj": torch.ones(3, 6, 5)}
    task = loraspan.adapters.Adapter("own", {"experts.gate_up_proj[1]": slot}, extras)
    served = loraspan.attach(nn.ModuleDict({"experts": Plain()}), loraspan.compress([task], rank=1))
    with pytest.raises(UnsupportedError, match=r"'own'.*a Plain holds stacked experts"), served.tasks("own"):
        pass


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


@pytest.mark.parametrize(
    ("experts", "path"),
    [
        (nn.ModuleList([nn.Linear(5, 3)]), "experts.0"),
        (nn.ModuleDict({"expert_0": nn.Linear(5, 3)}), "experts.expert_0"),
    ],
)
def test_experts_in_a_list_are_refused_by_name(experts, path):
    """They are handed tokens of rows that nobody knows there, in a number that may divide by chance."""
    slot = loraspan.adapters.Slot(torch.eye(1, 5), torch.eye(3, 1), scale=3.0)
    space = loraspan.compress([loraspan.adapters.Adapter("one", {path: slot})], rank=1)
    with pytest.raises(LoraspanError, match=re.escape(path)):
        loraspan.attach(nn.ModuleDict({"experts": experts}), space)
    # what all tokens go through is none of them
    moved = loraspan.adapters.Adapter("one", {path.replace("experts", "shared_experts"): slot})
    loraspan.attach(nn.ModuleDict({"shared_experts": experts}), loraspan.compress([moved], rank=1))
