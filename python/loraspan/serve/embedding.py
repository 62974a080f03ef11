"""An embedding with tasks: the row of the table that a token picks, and what the token's task adds to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraspan.errors import ArgumentError, UnsupportedError
from loraspan.ops.cores import Cores
from loraspan.ops.packed import Packed, unpacked
from loraspan.ops.packed_reference import BLOCK, LEVELS
from loraspan.ops.rounding import narrow
from loraspan.serve.known import body_of, plain, same_code
from loraspan.serve.layer import Served
from loraspan.serve.rows import Rows
from loraspan.serve.steady import steady
from loraspan.serve.tables import SlotTables, Triple

# what the scaled embeddings of transformers do, with a factor that is a number or a tensor
_SCALED = (
    "return super().forward(input_ids) * self.embed_scale",
    "return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)",
)
# entries of tables that are gathered at once, outside compiled graphs
_GATHERED = 1 << 23


class ServedEmbedding(Served):
    r"""``base(tokens) + s dW[:, tokens]``: nothing as large as the vocabulary is formed, and no token becomes a vector.

    ``s`` is 1, or the factor by which the base multiplies what it looks up, as PEFT has it. Products with the right
    ends of columns, one number each, are looked up: rows of the input basis ``V [vocabulary, k_in]``, entries of
    private right ends. A padding token is a token like others, for that is what its row in ``W + dW`` says;
    ``max_norm`` would rescale that row and is refused. Sums are kept in float32, or in float64 where a table is
    float64, and an entry is rounded once: to first order within ``(k_in + k_out + P + 4) u`` times
    ``|y| + |s| |dW|'`` of the exact one, ``P`` the columns of the row's tasks and ``|dW|'`` made of the absolute
    values of all factors. Plain torch: it compiles whole.

    Args:
        base: an `nn.Embedding`, or one of transformers that scales what it looks up.
        path: of it in the model.
        tables: of its slot.

    Raises:
        UnsupportedError: if it is another kind of embedding, or has a ``max_norm``.
    """

    tables: SlotTables

    def __init__(self, base: nn.Module, path: str, tables: SlotTables) -> None:
        super().__init__(base, path)
        self.tables = tables
        self._scaled = _check(plain(base), path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up ``tokens``, int64 ``[B, ...]``; ``[B, ..., n]``."""
        y: Tensor = self.base(tokens)
        rows = self.rows()
        if rows is None or not tokens.numel():
            return y
        scale: Any = self.base.embed_scale if self._scaled else 1.0
        return steady(self.path, self.tables, lambda now: _looked_up(y, tokens, rows, now, scale))


def _looked_up(y: Tensor, tokens: Tensor, rows: Rows, now: Triple, scale: float | Tensor) -> Tensor:
    """Give ``y`` and what the tasks add to it."""
    cores = now.cores
    batch = _batch(tokens, rows, cores)
    eager = not torch.compiler.is_compiling()
    if eager and y.device.type == "cpu" and bool(batch.wrong.any()):
        raise ArgumentError(f"rows {batch.wrong.nonzero()[:, 0].tolist()} have tasks whose columns are not there")
    groups, each = batch.tokens.shape
    step = max(1, _GATHERED // max(1, groups * sum(cores.most) * batch.ids.shape[1])) if eager else each
    flat = y.reshape(groups, each, y.shape[-1])
    parts = [
        _added(flat[:, at : at + step], batch._replace(tokens=batch.tokens[:, at : at + step]), now.v, now.u, scale)
        for at in range(0, each, step)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).reshape(y.shape)


def _check(base: nn.Module, path: str) -> bool:
    """Refuse what is not known; say whether what it looks up is scaled."""
    kind, forward = type(base).__name__, type(base).forward
    if not isinstance(base, nn.Embedding):
        raise UnsupportedError(f"attach: module {path!r} is to be an embedding, as its slot is; it is a {kind}")
    if base.max_norm is not None:
        raise UnsupportedError(
            f"attach: embedding {path!r} has max_norm {base.max_norm}, which rescales its rows when they are looked "
            "up: with a task added that is not defined. Set max_norm to None"
        )
    if forward is nn.Embedding.forward:
        return False
    if any(same_code(body_of(forward), known) for known in _SCALED):
        return True
    raise UnsupportedError(
        f"attach: module {path!r} is a {kind}, an embedding with a forward of its own that is not known here; "
        "export the tasks, or give it a plain nn.Embedding"
    )


class _Batch(NamedTuple):
    """Tokens in groups of one task (or mixture) each.

    Attributes:
        tokens: ``[G, T]``.
        ids: ``[G, m]``, tasks of the groups; -1 for none.
        shares: ``[G, m]`` or None.
        known: ``[G, m, 10]``, rows of ``cores.index``, zeros where there is no task.
        wrong: ``[G]``, whether a task is out of range or gone.
        cores: the columns.
    """

    tokens: Tensor
    ids: Tensor
    shares: Tensor | None
    known: Tensor
    wrong: Tensor
    cores: Cores


def _batch(tokens: Tensor, rows: Rows, cores: Cores) -> _Batch:
    lead = tokens.shape[:1] if rows.per == "row" and tokens.ndim > 1 else tokens.shape
    ids, shares = rows.of(lead, tokens.device)
    if ids.ndim == 1:
        ids, shares = ids[:, None], None if shares is None else shares[:, None]
    there = (ids >= 0) & (ids < cores.tasks)
    index = cores.index if cores.tasks else cores.index.new_zeros(1, 10)
    known = torch.where(there[..., None], index[ids.clamp(0, max(0, cores.tasks - 1))], 0)
    beyond = (ids < -1) | (ids >= cores.tasks)
    return _Batch(tokens.reshape(ids.shape[0], -1), ids, shares, known, (beyond | _astray(known, cores)).any(1), cores)


def _astray(known: Tensor, cores: Cores) -> Tensor:
    """Say which tasks have columns outside the tables ``[G, m]``: such is a task that is gone."""
    ss, sp, ps, pp, dense = known[..., 5:].unbind(-1)
    kept = torch.where(dense > 0, 0, ss)
    lengths = (ss + sp + ps + pp, ss + sp, ps + pp, kept + ps, sp + pp)
    heights = (cores.weights.shape[0], *(table.shape[0] for table in cores.ends))
    outside = torch.zeros_like(ss, dtype=torch.bool)
    # numbers and not a tensor of them, which a captured graph could not have sent to a GPU
    for start, length, height in zip(known[..., :5].unbind(-1), lengths, heights, strict=True):
        outside |= (start < 0) | (start + length > height)
    for count, most in zip((ss, sp, ps, pp), cores.most, strict=True):
        outside |= (count < 0) | (count > most)
    return outside


def _added(y: Tensor, batch: _Batch, v: Tensor | Packed, u: Tensor | Packed, scale: float | Tensor) -> Tensor:
    """Give ``y [G, T, n]`` and what the tasks add to it."""
    cores = batch.cores
    kept = (y, v, u, *cores.ends)
    wide = torch.float64 if torch.float64 in [t.dtype for t in kept if isinstance(t, Tensor)] else torch.float32
    coefficients, own = _sums(batch, _rows_of_basis(v, batch.tokens).to(wide))
    added = coefficients @ unpacked(u).to(wide).T if coefficients is not None else None
    if own is not None:
        added = own if added is None else added + own
    if added is None:
        sums = y
    else:
        factor = scale.to(wide) if isinstance(scale, Tensor) else scale
        sums = y.to(wide) + factor * added
        # the one rounding of float64 that narrow does has no gradient
        sums = sums.to(y.dtype) if sums.requires_grad else narrow(sums, y.dtype)
        sums = torch.where((batch.ids >= 0).any(1)[:, None, None], sums, y)
    return torch.where(batch.wrong[:, None, None], torch.nan, sums)


def _sums(batch: _Batch, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Give coefficients on the output basis ``[G, T, k_out]``, and the sum of private left ends ``[G, T, n]``."""
    cores, known, wide = batch.cores, batch.known, z.dtype
    left, left_own, right, right_own = cores.ends
    ss, sp, ps, _, dense = known[..., 5:].unbind(-1)
    kept = torch.where(dense > 0, 0, ss)
    # per form: where its left and right ends lie, from which row on
    forms = (
        (left, known[..., 1], right, known[..., 3]),
        (left, known[..., 1] + ss, right_own, known[..., 4]),
        (left_own, known[..., 2], right, known[..., 3] + kept),
        (left_own, known[..., 2] + ps, right_own, known[..., 4] + sp),
    )
    totals: list[Tensor | None] = [None, None]
    before = torch.zeros_like(ss)
    for form, (lefts, left_start, rights, right_start) in enumerate(forms):
        count, most = known[..., 5 + form], cores.most[form]
        if most:
            place = torch.arange(most, device=z.device)
            mask = ((place < count[..., None]) & ~batch.wrong[:, None, None]).flatten(1)
            at = [(start[..., None] + place).flatten(1) for start in (known[..., 0] + before, left_start, right_start)]
            weight = cores.weights[torch.where(mask, at[0], 0)].to(wide)
            if batch.shares is not None:
                weight = weight * batch.shares.to(wide).repeat_interleave(most, dim=1)
            if form in (1, 3):
                products = _entries(rights, torch.where(mask, at[2], 0)[:, None], batch.tokens[..., None]).to(wide)
            else:
                products = _on_basis(batch, z, rights, at[2], mask & ~_dense(dense, most) if form == 0 else mask, most)
            loads = torch.where(mask[:, None], products * weight[:, None], 0.0)
            total, side = loads @ _rows(lefts, at[1], mask, wide), int(form > 1)
            before_it = totals[side]
            totals[side] = total if before_it is None else before_it + total
        before = before + count
    return totals[0], totals[1]


def _dense(dense: Tensor, most: int) -> Tensor:
    return (dense > 0).repeat_interleave(most, dim=1)


def _on_basis(batch: _Batch, z: Tensor, rights: Tensor | Packed, at: Tensor, mask: Tensor, most: int) -> Tensor:
    """Give the products of shared right ends ``[G, T, m * most]``; those of a dense core are the entries of ``z``."""
    products = z @ _rows(rights, at, mask, z.dtype).mT
    axes = torch.nn.functional.pad(z[..., :most], (0, max(0, most - z.shape[-1]))).repeat(1, 1, batch.ids.shape[1])
    return torch.where(_dense(batch.known[..., 9], most)[:, None] & ~mask[:, None], axes, products)


def _rows(table: Tensor | Packed, at: Tensor, mask: Tensor, wide: torch.dtype) -> Tensor:
    """Give rows of a table ``[G, ., width]``, zeros where ``mask`` is off."""
    rows, width = table.shape
    if not rows:
        return torch.zeros(*at.shape, width, dtype=wide, device=at.device)
    at = torch.where(mask, at, 0)
    found = table[at] if isinstance(table, Tensor) else _entries(table, at[..., None], _count(width, at))
    return torch.where(mask[..., None], found.to(wide), 0.0)


def _rows_of_basis(v: Tensor | Packed, tokens: Tensor) -> Tensor:
    """Give ``v[tokens]``, ``[G, T, k_in]``."""
    if isinstance(v, Tensor):
        return v[tokens]
    return _entries(v, _count(v.shape[0], tokens), tokens[..., None])


def _count(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)


def _entries(table: Tensor | Packed, rows: Tensor, columns: Tensor) -> Tensor:
    """Give single entries of a table, of rows and columns that are broadcast; nothing else is unpacked."""
    if not table.shape[0]:
        return torch.zeros_like(rows + columns, dtype=torch.float32)
    if isinstance(table, Tensor):
        return table[rows, columns]
    step = table.scales[rows, columns // BLOCK].to(torch.float32) * 2.0**-7
    if table.bits > 4:
        return table.numbers[rows, columns].to(torch.float32) * step
    half = (table.codes[rows, columns // 2] >> (4 * (columns % 2)).to(torch.uint8)) & 15
    return torch.tensor(LEVELS, dtype=torch.float32, device=half.device)[half.long()] * step
