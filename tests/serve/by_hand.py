"""Modules and tasks with parameters of their own, small enough to say by hand what comes out."""

import torch
from torch import nn

import loraspan
import oracles
from loraspan.adapters import Adapter, Slot
from matrices import normal
from oracles import F32

U32 = oracles.UNIT_ROUNDOFF[F32]


def assert_close(actual, expected):
    """Two float32 runs of a model of about a hundred sums, as in the tests of exported adapters."""
    assert (actual - expected).norm() <= 100 * U32 * expected.norm()


class Composite(nn.Module):
    """A head with a parameter of its own and layers below, one of which is adapted."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 6), 1.5))
        self.dense, self.out_proj = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, mask=None):
        x = torch.tanh(self.dense(x)) * self.scale
        return self.out_proj(x if mask is None else x * mask)


def headed(name, labels, seed=0):
    """A task with a head of its own, for ``Heads``."""
    rng = torch.Generator().manual_seed(seed)
    extras = {f"base_model.model.head.{key}": torch.randn(*shape, generator=rng) for key, shape in
              {"weight": (labels, 6), "bias": (labels,)}.items()}  # fmt: skip
    slot = Slot(torch.randn(2, 5, generator=rng), torch.randn(6, 2, generator=rng), 0.7)
    return Adapter(name, {"body": slot}, extras, {"lora_alpha": 1.4, "r": 2})


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


def heads(*labels, **options):
    space = loraspan.compress([headed(f"of {n}", n, n) for n in labels], max_error=1e-6, dtype=F32)
    torch.manual_seed(3)
    model = Heads().requires_grad_(False)
    return model, space, loraspan.attach(model, space, **options)


X = normal(4, 4, 5, dtype=F32)


def of_composite(name, seed=2):
    slot = Slot(normal(seed, 2, 6, dtype=F32), normal(seed + 1, 6, 2, dtype=F32), 0.7)
    extras = {"base_model.model.0.scale": normal(seed + 2, 1, 6, dtype=F32)}
    return Adapter(name, {"0.dense": slot}, extras, {"lora_alpha": 1.4, "r": 2})


class Small(nn.Module):
    """One of each module that a graph can hold with parameters of several tasks."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(48, 6), nn.LayerNorm(6)
        self.conv, self.head = nn.Conv2d(6, 5, (1, 3)), nn.Linear(5, 3)

    def forward(self, tokens):
        grid = self.norm(self.table(tokens)).permute(0, 2, 1).unflatten(2, (2, 4))
        return self.head(self.conv(grid).mean((2, 3)))


def of_small(name, seed):
    shapes = {"table.weight": (48, 6), "norm.weight": (6,), "norm.bias": (6,), "conv.bias": (5,), "head.weight": (3, 5)}
    shapes |= {"head.bias": (3,), "head.lora_B.bias": (3,)}
    extras = {
        f"base_model.model.{key}": normal(seed + i, *shape, dtype=F32) for i, (key, shape) in enumerate(shapes.items())
    }
    slot = Slot(normal(seed, 2, 5, dtype=F32), normal(seed + 1, 3, 2, dtype=F32), 0.7)
    return Adapter(name, {"head": slot}, extras, {"lora_alpha": 1.4, "r": 2, "lora_bias": True})
