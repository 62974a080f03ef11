"""Columns of tasks to feed `shared_lora`: of every form, factored and dense, and what their dW is in float64."""

import numpy as np
import torch

import oracles
from loraspan.ops import Cores
from matrices import normal
from oracles import F32


def planted(seed, counts, n, d, k_out, k_in, *, dtype=F32, dense=()):
    """Random columns for tasks of ``counts``, ``(ss, sp, ps, pp)`` each; tasks in ``dense`` hold a dense core."""
    table = np.asarray(counts, dtype=np.int64).reshape(-1, 4).copy()
    full = np.zeros(len(table), dtype=bool)
    full[list(dense)] = True
    table[full, 0] = k_in
    ss, sp, ps, pp = table.T
    heights = (ss + sp).sum(), (ps + pp).sum(), (np.where(full, 0, ss) + ps).sum(), (sp + pp).sum()
    widths = k_out, n, k_in, d
    ends = [normal(seed + i, int(h), w, dtype=dtype) for i, (h, w) in enumerate(zip(heights, widths, strict=True))]
    weights = normal(seed + 9, int(table.sum())).abs()
    return Cores.of(table, weights, *ends, dense=full)


def columns(cores, v, u, task):
    """``weights [P]``, ``left [P, n]`` and ``right [P, d]`` of a task in float64, column by column."""
    w, l, lp, r, rp, ss, sp, ps, pp, dense = cores.index[task].tolist()
    v, u = oracles.to_numpy(v), oracles.to_numpy(u)
    tables = [oracles.to_numpy(t) for t in (cores.left, cores.left_private, cores.right, cores.right_private)]
    left = [u @ row for row in tables[0][l : l + ss + sp]] + list(tables[1][lp : lp + ps + pp])
    shared = list(tables[2][r : r + (0 if dense else ss) + ps])
    on_v = list(v.T[:ss]) if dense else [v @ row for row in shared[:ss]]
    own = list(tables[3][rp : rp + sp + pp])
    right = on_v + own[:sp] + [v @ row for row in shared[0 if dense else ss :]] + own[sp:]
    count = ss + sp + ps + pp
    weights = oracles.to_numpy(cores.weights)[w : w + count]
    return weights, np.reshape(left, (count, len(u))), np.reshape(right, (count, len(v)))


def delta(cores, v, u, task):
    """``dW [n, d]`` of a task in float64."""
    # infinities that a test has planted meet zeros
    with np.errstate(invalid="ignore"):
        weights, left, right = columns(cores, v, u, task)
        return (left.T * weights) @ right


def absolute(cores):
    """The same tasks with every entry of every factor made positive: what error bounds are made of."""
    tables = (cores.weights, cores.left, cores.left_private, cores.right, cores.right_private)
    return Cores(cores.index, *(t.abs() for t in tables), cores.most)


def expected(y, x, v, u, cores, tasks, shares=None, scale=1.0):
    """``y + scale sum shares dW x`` in float64, and the largest error that is allowed of an answer of ``y``'s dtype."""
    tasks = (tasks if tasks.ndim == 2 else tasks[:, None]).numpy()
    shares = np.ones(tasks.shape) if shares is None else oracles.to_numpy(shares).reshape(tasks.shape)
    bound_cores, bound_v, bound_u = absolute(cores), v.abs(), u.abs()
    out, size = oracles.to_numpy(y).copy(), np.abs(oracles.to_numpy(y))
    inputs, counts = oracles.to_numpy(x), cores.index[:, 5:9].sum(dim=1).numpy()
    known = {
        int(t): (delta(cores, v, u, t), delta(bound_cores, bound_v, bound_u, t)) for t in np.unique(tasks[tasks >= 0])
    }
    steps = np.full(len(x), len(v) + v.shape[1] + u.shape[1] + 8)
    for row in range(len(x)):
        for task, share in zip(tasks[row], shares[row], strict=True):
            if task >= 0:
                exact, bound = known[int(task)]
                with np.errstate(invalid="ignore"):
                    out[row] += scale * share * (exact @ inputs[row])
                    size[row] += abs(scale * share) * (bound @ np.abs(inputs[row]))
                steps[row] += counts[task]
    wide = oracles.F64 if oracles.F64 in (y.dtype, x.dtype, v.dtype, u.dtype, cores.left.dtype) else F32
    # and the oracle's own roundings, of which it has no more
    factor = oracles.gamma(steps, oracles.UNIT_ROUNDOFF[wide]) + oracles.gamma(
        steps, oracles.UNIT_ROUNDOFF[oracles.F64]
    )
    before = factor[:, None] * size + (steps[:, None] + 1) * oracles.TINY
    bound = oracles.rounding_bound(out, before, y.dtype)
    none = (tasks < 0).all(axis=1)
    return out, np.where(none[:, None], 0.0, bound)


def batch(seed, rows, n, d, k_out, k_in, dtype=F32):
    """``y, x, v, u`` of one dtype; the bases are about orthonormal in size."""
    y, x = normal(seed, rows, n, dtype=dtype), normal(seed + 1, rows, d, dtype=dtype)
    v = (normal(seed + 2, d, k_in) / max(d, 1) ** 0.5).to(dtype)
    u = (normal(seed + 3, n, k_out) / max(n, 1) ** 0.5).to(dtype)
    return y, x, v, u


def random_tasks(seed, rows, mixture, tasks):
    """Rows of a table of ``tasks`` tasks, and -1, all about equally often."""
    return torch.randint(-1, tasks, (rows, mixture), generator=torch.Generator().manual_seed(seed))
