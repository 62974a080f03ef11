"""A small model that needs no library, a space of tasks for it, and what it makes of a row with a task, in float64."""

import planted
import torch
from torch import nn

import loraspan

N, D, TOKENS = 40, 56, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.back = nn.Linear(D, N), nn.Linear(N, D, bias=False)

    def forward(self, x):
        return x + self.back(torch.tanh(self.q_proj(x)))


class Tower(nn.Module):
    """``[B, T, 56]`` to the same; tasks adapt ``layers.0.q_proj`` and ``layers.1.q_proj``."""

    def __init__(self, seed=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x, *, extra=0.0):
        for layer in self.layers:
            x = layer(x)
        return x + extra


def adapters(**options):
    """Nine, ``task 0`` to ``task 8``, of ranks 3 to 5, norms an order of magnitude apart."""
    return planted.adapters(shape=(N, D), **options)


def team(count=4, **options):
    """A space of tasks in all forms: the first with dense or factored cores, the last two with private columns."""
    made = adapters(noise=0.1, **options)
    space = loraspan.compress(made[: count - 2], rank=6)
    space.add(made[count - 2 : count], max_error=0.01)
    return space


def trained_deltas(served, path, count=4):
    """``dW`` of tasks by number, float64, from a slot's leaves by the definition of the columns; differentiable."""
    (v, u, cores), found = served.model.get_submodule(path).tables.now, []
    v, u, weights, left_shared, right_shared = (t.double() for t in (v, u, cores.weights, cores.left, cores.right))
    left_own, right_own = cores.left_private.double(), cores.right_private.double()
    for fields in cores.index[:count].tolist():
        w, l, lp, r, rp, ss, sp, ps, pp, full = fields
        left = torch.cat([left_shared[l : l + ss + sp] @ u.T, left_own[lp : lp + ps + pp]])
        kept = 0 if full else ss
        shared = v.T[:ss] if full else right_shared[r : r + ss] @ v.T
        own, more = right_own[rp : rp + sp + pp], right_shared[r + kept : r + kept + ps] @ v.T
        right = torch.cat([shared, own[:sp], more, own[sp:]])
        found.append((left * weights[w : w + ss + sp + ps + pp, None]).T @ right)
    return found


def batch(rows, dtype=torch.float32, seed=3):
    return torch.randn(rows, TOKENS, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(space, x, tasks):
    """What the tower gives for each row with its task, None or mixture, in float64."""
    rows = []
    for row, task in zip(x.double(), tasks, strict=True):
        model = Tower().double()
        shares = task if isinstance(task, dict) else {} if task is None else {task: 1.0}
        for path in space.collection.slots:
            weight = model.get_submodule(path).weight
            for name, share in shares.items():
                if path in space.collection.task(name).scales:
                    weight.data += share * torch.from_numpy(planted.stored_delta(space.collection, path, name))
        rows.append(model(row[None])[0])
    return torch.stack(rows).detach()


def close(actual, wanted, dtype=torch.float32):
    """Fail unless the tower's outputs agree.

    Each of 4 products, 2 of them with a task, sums up to 56 + 2 * 12 columns and 8 more roundings; entries of
    activations and of their absolute sums stay below 2^9.
    """
    u = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    bound = 4 * (D + 24 + 8) * u * max(float(wanted.abs().max()), 1.0)
    worst = float((actual.detach().cpu().double() - wanted).abs().max())
    assert worst <= bound, f"{worst:.3g} above {bound:.3g}"
