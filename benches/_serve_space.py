"""What ``benches/serve.py`` serves: a space of drawn tasks, their factors, and the models that they adapt."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from loraspan import Subspace
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import Columns

SEED = 20261122
HEAD = 64
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


class Sizes(NamedTuple):
    """Width of the shared bases, and rank of every task."""

    rank: int = 64
    lora_rank: int = 16


class Drawn(NamedTuple):
    """One slot: bases ``v [d, k]`` and ``u [n, k]``, ends ``left``, ``right [tasks * r, k]``, ``weights``."""

    v: Tensor
    u: Tensor
    left: Tensor
    right: Tensor
    weights: Tensor

    def factors(self, tasks: Sequence[int], lora_rank: int) -> tuple[Tensor, Tensor]:
        """Give ``a [T, r, d]`` and ``b [T, n, r]`` of tasks in float64: ``dW = b a``."""
        rows = (torch.tensor(tasks)[:, None] * lora_rank + torch.arange(lora_rank)).flatten()
        a = self.right[rows].double() @ self.v.double().T
        b = (self.left[rows].double() * self.weights[rows, None].double()) @ self.u.double().T
        return a.view(len(tasks), lora_rank, -1), b.view(len(tasks), lora_rank, -1).mT


def names(count: int) -> list[str]:
    """Name the tasks."""
    return [f"task {i}" for i in range(count)]


def draw(shapes: Mapping[str, tuple[int, int]], tasks: int, sizes: Sizes) -> dict[str, Drawn]:
    """Draw the columns of all tasks in slots of shapes ``(n, d)``; their ``dW`` moves an output by about a quarter."""
    here = torch.Generator().manual_seed(SEED)
    rank, count = sizes.rank, tasks * sizes.lora_rank

    def unit(rows: int) -> Tensor:
        return functional.normalize(torch.randn(rows, rank, generator=here), dim=1)

    found = {}
    for path, (n, d) in shapes.items():
        v, u = (torch.linalg.qr(torch.randn(length, rank, generator=here)).Q.contiguous() for length in (d, n))
        weights = torch.rand(count, generator=here) * 0.4 * (n / sizes.lora_rank) ** 0.5
        found[path] = Drawn(v, u, unit(count), unit(count), weights)
    return found


def space_of(drawn: Mapping[str, Drawn], tasks: int, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Subspace:
    """Give the space that holds them, bases and ends in ``dtype``."""
    scales, ranks = dict.fromkeys(drawn, 1.0), dict.fromkeys(drawn, sizes.lora_rank)
    counts = np.tile(np.array([sizes.lora_rank, 0, 0, 0], dtype=np.int64), (tasks, 1))
    columns = {}
    for path, slot in drawn.items():
        left, right = slot.left.to(dtype), slot.right.to(dtype)
        none = [torch.empty(0, len(basis), dtype=dtype) for basis in (slot.u, slot.v)]
        rows, factored = np.arange(tasks), np.zeros(tasks, dtype=np.bool_)
        columns[path] = Columns(rows, counts, factored, slot.weights, left, none[0], right, none[1])
    made = tuple(Task(name, 0.0, "measured", 1.0, scales, ranks) for name in names(tasks))
    slots = {path: SlotSpace(slot.u.to(dtype), slot.v.to(dtype)) for path, slot in drawn.items()}
    return Subspace(Collection(slots, (Segment(made, columns),), dtype))


class Ready(nn.Linear):
    """A base layer whose product is there already: it hands back ``answer [1, n]`` for every row."""

    answer: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Give ``[rows, n]``."""
        return self.answer.expand(len(input), -1).clone()


class Layers(nn.Module):
    """Layers side by side, each with rows of its own."""

    def __init__(self, size: int, count: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Ready(size, size, bias=False, device="meta").to_empty(device=device).to(dtype) for _ in range(count)
        )
        drawn = torch.Generator(device).manual_seed(SEED)
        for layer in self.layers:
            layer.weight.data.zero_()
            layer.answer = torch.randn(1, size, device=device, generator=drawn).to(dtype)

    def forward(self, xs: Tensor) -> list[Tensor]:
        """Give ``[rows, n]`` for each layer's rows of ``xs [count, rows, d]``."""
        return [layer(x) for layer, x in zip(self.layers, xs.unbind(), strict=True)]


class Attention(nn.Module):
    """Llama's: rotary positions, causal, as many heads for keys as for queries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Take and give ``[B, T, width]``."""
        head = min(HEAD, x.shape[-1] // 2)
        q, k, v = (p(x).unflatten(-1, (-1, head)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        turn = torch.arange(x.shape[1], device=x.device)[:, None] * 10000.0 ** (
            -torch.arange(0, head, 2, device=x.device) / head
        )
        cos, sin = (f(turn).repeat(1, 2).to(x.dtype) for f in (torch.cos, torch.sin))
        q, k = (t * cos + torch.cat([-t[..., head // 2 :], t[..., : head // 2]], dim=-1) * sin for t in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class Mlp(nn.Module):
    """Llama's: a gate and two products."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take and give ``[B, T, width]``."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention and perceptron, normalised before each."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.self_attn, self.mlp = Attention(width), Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Take and give ``[B, T, width]``."""
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """The layers of a Llama, between embedding and head: what an adapter's cost is to be compared with."""

    def __init__(self, width: int, hidden: int, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.device("meta"):
            made = [Block(width, hidden) for _ in range(layers)]
        self.layers = nn.ModuleList(block.to_empty(device=device).to(dtype) for block in made)
        drawn = torch.Generator(device).manual_seed(SEED)
        for weight in self.parameters():
            spread = weight.shape[-1] ** -0.5
            weight.data.normal_(std=spread, generator=drawn) if weight.ndim == 2 else weight.data.fill_(1.0)
            weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Take and give ``[B, T, width]``."""
        for layer in self.layers:
            x = layer(x)
        return x


def twin(model: nn.Module) -> nn.Module:
    """Give a model of its own modules with the same tensors, for a contender that replaces modules."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    answers = {id(m.answer): m.answer for m in model.modules() if isinstance(m, Ready)}
    return copy.deepcopy(model, held | answers)


def exact(model: Llama, x: Tensor, drawn: Mapping[str, Drawn], tasks: Sequence[int] | None, sizes: Sizes) -> Tensor:
    """Give what the model makes of rows ``x [B, T, width]`` in float64, of a task each or of none; layer by layer."""
    h = x.double()
    for i, layer in enumerate(model.layers):
        wide = copy.deepcopy(layer).double()
        for name in ADAPTED if tasks is not None else ():
            assert tasks is not None
            a, b = (t.to(x.device) for t in drawn[f"layers.{i}.self_attn.{name}"].factors(tasks, sizes.lora_rank))

            def add(_: nn.Module, given: tuple[Tensor], out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return out + given[0] @ a.mT @ b.mT

            wide.self_attn.get_submodule(name).register_forward_hook(add)
        h = wide(h)
    return h


def slots_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Give the shapes ``(n, d)`` of what is adapted in a model."""
    adapted = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Ready) or path.rpartition(".")[2] in ADAPTED
    ]
    return {path: (module.out_features, module.in_features) for path, module in adapted}
