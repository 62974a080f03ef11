"""The two kernels of shared_lora: what they do together and cost is said in :mod:`loraspan.triton_ops.shared_lora`."""

import triton
import triton.language as tl

from loraspan.triton_ops.rounding import narrow
from loraspan.triton_ops.rows import element, vector
from loraspan.triton_ops.strided import entries, put

# the arguments that are numbers: one compilation for all of their values
SHRINK_NUMBERS = [
    "rows", "d", "k_in", "mixture", "count", "private", "slabs", "slab", "right_private_rows", "x_stride_t",
    "x_stride_d", "v_stride_d", "v_stride_k", "index_stride_r", "index_stride_f", "tasks_stride_t", "tasks_stride_m",
]  # fmt: skip
EXPAND_NUMBERS = [
    "scale", "rows", "n", "k_in", "k_out", "mixture", "count", "private", "slabs", "wide", "left_private_rows",
    "right_rows", "y_stride_t", "y_stride_n", "u_stride_n", "u_stride_k", "index_stride_r", "index_stride_f",
    "tasks_stride_t", "tasks_stride_m", "shares_stride_t", "shares_stride_m",
]  # fmt: skip


@triton.jit(do_not_specialize=SHRINK_NUMBERS)
def shrink_kernel(
    x, v, index, right_private, tasks, sums,
    rows, d, k_in, mixture, count, private, slabs, slab, right_private_rows,
    x_stride_t, x_stride_d, v_stride_d, v_stride_k, index_stride_r, index_stride_f, tasks_stride_t, tasks_stride_m,
    KIND_X: tl.constexpr, FORM_X: tl.constexpr, KIND_V: tl.constexpr, FORM_V: tl.constexpr,
    KIND_E: tl.constexpr, FORM_E: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply one slab of a tile of x with a tile of V, or with one private right end of each row's task."""
    SUM: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    split = tl.program_id(0) % slabs
    t = (tl.program_id(0) // slabs).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    # of 128 columns, which tells the compiler how addresses are aligned
    start = split.to(tl.int64) * (slab.to(tl.int64) // 128 * 128)
    end = tl.minimum(start + slab, d.to(tl.int64))
    width = k_in + mixture * private
    own = sums + split.to(tl.int64) * rows * width + t * width
    part = tl.program_id(1)
    whole = tl.cdiv(k_in, BLOCK_K)
    if part < whole:
        k = part * BLOCK_K + tl.arange(0, BLOCK_K)
        j = start + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_T, BLOCK_K), SUM)
        a = entries(x, x_stride_t.to(tl.int64), x_stride_d.to(tl.int64), t, rows, j, end, KIND_X, FORM_X).to(TYPE)
        b = entries(v, v_stride_d.to(tl.int64), v_stride_k.to(tl.int64), j, end, k, k_in, KIND_V, FORM_V).to(TYPE)
        # carried into the turn that multiplies them, as in products_kernel
        for chunk in range(start, end, BLOCK_D):
            acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=SUM)
            j = chunk + BLOCK_D + tl.arange(0, BLOCK_D)
            a = entries(x, x_stride_t.to(tl.int64), x_stride_d.to(tl.int64), t, rows, j, end, KIND_X, FORM_X).to(TYPE)
            b = entries(v, v_stride_d.to(tl.int64), v_stride_k.to(tl.int64), j, end, k, k_in, KIND_V, FORM_V).to(TYPE)
        tl.store(own[:, None] + k[None, :], acc, mask=(t < rows)[:, None] & (k < k_in)[None, :])
    else:
        slot = part - whole
        q, e = slot // private, slot % private
        task = tl.load(tasks + t * tasks_stride_t + q * tasks_stride_m, mask=t < rows, other=-1)
        known = (task >= 0) & (task < count)
        fields = index + task * index_stride_r
        first = tl.load(fields + 4 * index_stride_f, mask=known, other=0)
        has = tl.load(fields + 6 * index_stride_f, mask=known, other=0)
        has += tl.load(fields + 8 * index_stride_f, mask=known, other=0)
        row = tl.where(known & (e < has), first + e, right_private_rows)
        # nothing is read where no row of the tile has so many
        end = tl.where(tl.max(has, 0) > e, end, start)
        total = tl.zeros((BLOCK_T,), SUM)
        for chunk in range(start, end, BLOCK_D):
            j = chunk + tl.arange(0, BLOCK_D)
            a = entries(x, x_stride_t.to(tl.int64), x_stride_d.to(tl.int64), t, rows, j, end, KIND_X, FORM_X).to(SUM)
            b = entries(right_private, d.to(tl.int64), 1, row, right_private_rows, j, end, KIND_E, FORM_E).to(SUM)
            total += tl.sum(a * b, 1)
        tl.store(own + k_in + slot, total, mask=t < rows)


@triton.jit(do_not_specialize=EXPAND_NUMBERS)
def expand_kernel(
    y, u, index, weights, left, left_private, right, tasks, shares, sums, scale,
    rows, n, k_in, k_out, mixture, count, private, slabs, wide, left_private_rows, right_rows,
    y_stride_t, y_stride_n, u_stride_n, u_stride_k, index_stride_r, index_stride_f, tasks_stride_t, tasks_stride_m,
    shares_stride_t, shares_stride_m,
    KIND_Y: tl.constexpr, FORM_Y: tl.constexpr, KIND_U: tl.constexpr, FORM_U: tl.constexpr,
    KIND_E: tl.constexpr, FORM_E: tl.constexpr, WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr,
    ONCE: tl.constexpr, SHARES: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Meet each row's columns and add them to ``wide`` columns of y, a tile at a time."""
    across = tl.cdiv(n, wide)
    t = (tl.program_id(0) // across).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    # of whole tiles, which tells the compiler how addresses are aligned
    begin = (tl.program_id(0) % across).to(tl.int64) * (wide.to(tl.int64) // BLOCK_N * BLOCK_N)
    k = tl.arange(0, WIDTH_IN)
    width = k_in + mixture * private
    step = rows.to(tl.int64) * width
    own = sums + t * width
    factor = scale.to(tl.int64).to(tl.float64, bitcast=True).to(SUM)
    z = tl.zeros((BLOCK_T, WIDTH_IN), SUM)
    for turn in range(0, slabs, BLOCK_S):
        # all of a turn's are on their way at once
        for one in tl.static_range(BLOCK_S):
            split = turn + one
            inside = (t < tl.where(split < slabs, rows, 0))[:, None] & (k < k_in)[None, :]
            z += tl.load(own[:, None] + split * step + k[None, :], mask=inside, other=0.0)
    if ONCE:
        g = _coefficients(
            0, z, own + k_in, step, slabs, t, rows, k_in, k_out, mixture, count, private, index, weights, left, right,
            tasks, shares, factor, index_stride_r, index_stride_f, tasks_stride_t, tasks_stride_m, shares_stride_t,
            shares_stride_m, KIND_E, FORM_E, WIDTH_IN, WIDTH_OUT, SHARES, SUM, BLOCK_T, BLOCK_C,
        )  # fmt: skip

    for turn in range(wide // BLOCK_N):
        j = begin + turn * BLOCK_N + tl.arange(0, BLOCK_N)
        added = tl.zeros((BLOCK_T, BLOCK_N), SUM)
        # columns whose left end is shared; 64 columns of U at a time, as g lies in registers
        if ONCE and tl.float64 != SUM:
            on_u = _part_of_u(u, u_stride_n, u_stride_k, j, n, 0, k_out, KIND_U, FORM_U, WIDTH_OUT, SUM)
            added = tl.dot(g, tl.trans(on_u), added, input_precision=PRECISION, out_dtype=SUM)
        else:
            if tl.float64 == SUM:
                # carried into the turn that multiplies it, as in products_kernel
                on_u = _part_of_u(u, u_stride_n, u_stride_k, j, n, 0, k_out, KIND_U, FORM_U, WIDTH_OUT, SUM)
            for start in range(0, k_out, WIDTH_OUT):
                if not ONCE:
                    g = _coefficients(
                        start, z, own + k_in, step, slabs, t, rows, k_in, k_out, mixture, count, private, index,
                        weights, left, right, tasks, shares, factor, index_stride_r, index_stride_f, tasks_stride_t,
                        tasks_stride_m, shares_stride_t, shares_stride_m, KIND_E, FORM_E, WIDTH_IN, WIDTH_OUT, SHARES,
                        SUM, BLOCK_T, BLOCK_C,
                    )  # fmt: skip
                if tl.float64 != SUM:
                    on_u = _part_of_u(u, u_stride_n, u_stride_k, j, n, start, k_out, KIND_U, FORM_U, WIDTH_OUT, SUM)
                added = tl.dot(g, tl.trans(on_u), added, input_precision=PRECISION, out_dtype=SUM)
                if tl.float64 == SUM:
                    later = start + WIDTH_OUT
                    on_u = _part_of_u(u, u_stride_n, u_stride_k, j, n, later, k_out, KIND_U, FORM_U, WIDTH_OUT, SUM)

        # columns whose left end is private, ps and then pp
        some, wrong = tl.zeros((BLOCK_T,), tl.int32), tl.zeros((BLOCK_T,), tl.int32)
        for q in range(mixture):
            task = tl.load(tasks + t * tasks_stride_t + q * tasks_stride_m, mask=t < rows, other=-1)
            known = (task >= 0) & (task < count)
            some += (task != -1).to(tl.int32)
            wrong += ((task < -1) | (task >= count)).to(tl.int32)
            share = _share(shares + t * shares_stride_t + q * shares_stride_m, known, factor, SHARES)
            at = index + task * index_stride_r
            ss, sp = _field(at, 5, index_stride_f, known), _field(at, 6, index_stride_f, known)
            ps, pp = _field(at, 7, index_stride_f, known), _field(at, 8, index_stride_f, known)
            dense = _field(at, 9, index_stride_f, known) != 0
            weight = weights + _field(at, 0, index_stride_f, known) + ss + sp
            left_at = _field(at, 2, index_stride_f, known)
            right_at = _field(at, 3, index_stride_f, known) + tl.where(dense, 0, ss)
            drawn = own + k_in + q * private + sp
            for c in range(tl.max(ps + pp, 0)):
                row = tl.where(c < ps, right_at + c, right_rows)
                h = tl.sum(z * entries(right, k_in, 1, row, right_rows, k, k_in, KIND_E, FORM_E).to(SUM), 1)
                h = tl.where(c < ps, h, _drawn(drawn + c - ps, step, slabs, (c >= ps) & (c < ps + pp), SUM))
                h *= share * tl.load(weight + c, mask=c < ps + pp, other=0.0).to(SUM)
                row = tl.where(c < ps + pp, left_at + c, left_private_rows)
                ends = entries(left_private, n, 1, row, left_private_rows, j, n, KIND_E, FORM_E).to(SUM)
                added += tl.where(c < ps + pp, h, 0.0)[:, None] * ends

        before = entries(y, y_stride_t.to(tl.int64), y_stride_n.to(tl.int64), t, rows, j, n, KIND_Y, FORM_Y).to(SUM)
        after = narrow(tl.where((wrong > 0)[:, None], float("nan"), before + added), element(KIND_Y))
        # rows without a task are not stored to: their place in the table of rows is past its end
        to = tl.where(some > 0, t, rows)
        put(y, y_stride_t.to(tl.int64), y_stride_n.to(tl.int64), to, rows, j, n, after, KIND_Y, FORM_Y)


@triton.jit
def _part_of_u(
    u, stride_n, stride_k, j, n, start, k_out, KIND: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Read ``[len(j), WIDTH]`` of U from column ``start`` on."""
    o = start + tl.arange(0, WIDTH)
    return entries(u, stride_n.to(tl.int64), stride_k.to(tl.int64), j, n, o, k_out, KIND, FORM).to(SUM)


@triton.jit
def _coefficients(
    start, z, drawn, step, slabs, t, rows, k_in, k_out, mixture, count, private, index, weights, left, right, tasks,
    shares, factor, index_stride_r, index_stride_f, tasks_stride_t, tasks_stride_m, shares_stride_t, shares_stride_m,
    KIND_E: tl.constexpr, FORM_E: tl.constexpr, WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, SHARES: tl.constexpr,
    SUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Give ``g [BLOCK_T, WIDTH_OUT]`` from column ``start`` of U on: columns ss, then sp, of every row's tasks."""
    k, o = tl.arange(0, WIDTH_IN), start + tl.arange(0, WIDTH_OUT)
    g = tl.zeros((BLOCK_T, WIDTH_OUT), SUM)
    for q in range(mixture):
        task = tl.load(tasks + t * tasks_stride_t + q * tasks_stride_m, mask=t < rows, other=-1)
        known = (task >= 0) & (task < count)
        share = _share(shares + t * shares_stride_t + q * shares_stride_m, known, factor, SHARES)
        at = index + task * index_stride_r
        ss, sp = _field(at, 5, index_stride_f, known)[:, None], _field(at, 6, index_stride_f, known)[:, None]
        dense = _field(at, 9, index_stride_f, known)[:, None] != 0
        weight = (weights + _field(at, 0, index_stride_f, known))[:, None]
        left_at = _field(at, 1, index_stride_f, known)[:, None]
        right_at = _field(at, 3, index_stride_f, known)[:, None]
        for first in range(0, tl.max(ss + sp), BLOCK_C):
            # [BLOCK_T, BLOCK_C], of each row's own task
            c = first + tl.arange(0, BLOCK_C)[None, :]
            ends = _columns(right, right_at + c, (c < ss) & (dense == 0), k, k_in, KIND_E, FORM_E).to(SUM)
            h = tl.sum(ends * z[:, None, :], 2)
            if tl.max(dense.to(tl.int32)) > 0:
                on_v = tl.sum(tl.where(k[None, None, :] == c[:, :, None], z[:, None, :], 0.0), 2)
                h = tl.where(dense & (c < ss), on_v, h)
            if tl.max(sp) > 0:
                products = (drawn + q * private)[:, None] + c - ss
                h = tl.where(c < ss, h, _drawn(products, step, slabs, (c >= ss) & (c < ss + sp), SUM))
            h *= share[:, None] * tl.load(weight + c, mask=c < ss + sp, other=0.0).to(SUM)
            ends = _columns(left, left_at + c, c < ss + sp, o, k_out, KIND_E, FORM_E).to(SUM)
            g += tl.sum(tl.where(c < ss + sp, h, 0.0)[:, :, None] * ends, 1)
    return g


@triton.jit
def _columns(table, row, inside, k, width, KIND: tl.constexpr, FORM: tl.constexpr):
    """Read ``[BLOCK_T, BLOCK_C, len(k)]``: rows of a table, 0 where not ``inside`` and from column ``width`` on."""
    at = table + row * width
    if FORM == "rows":
        VECTOR: tl.constexpr = vector(KIND)
        at = tl.multiple_of(at, [16, 16])
        width = width // VECTOR * VECTOR
    return tl.load(at[:, :, None] + k[None, None, :], mask=inside[:, :, None] & (k < width)[None, None, :], other=0.0)


@triton.jit
def _field(at, field, stride, known):
    return tl.load(at + field * stride, mask=known, other=0)


@triton.jit
def _share(at, known, factor, SHARES: tl.constexpr):
    """Give the scale of all of a row, times the share of one of its tasks."""
    if SHARES:
        share = factor * tl.load(at, mask=known, other=0.0).to(factor.dtype)
    else:
        share = factor + tl.zeros_like(known).to(factor.dtype)
    return share


@triton.jit
def _drawn(at, step, slabs, active, SUM: tl.constexpr):
    """Add the slabs of one private product per row, in order."""
    total = tl.zeros_like(active).to(SUM)
    for split in range(slabs):
        total += tl.load(at + split * step, mask=active, other=0.0)
    return total
