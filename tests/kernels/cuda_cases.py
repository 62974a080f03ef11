"""Small cases for every CUDA kernel, run on an emulated and sanitized library in a process of its own.

Reads lines ``LIBRARY OPERATOR ORDER`` and answers each with ``ok`` or with why not: a bound that is broken, or what the
sanitizer says. Each line is a fork, so that a fault ends nothing but itself; torch is imported once.
"""

import os
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import oracles
from kernels.emulation import set_order
from loraspan._cuda import library
from loraspan._cuda import reconstruct as cuda_reconstruct
from loraspan._cuda import shared_lora as cuda_shared_lora
from loraspan.ops import Cores, Piece, combine_many, gram, power, reconstruct_many, shared_lora, sketch
from matrices import blocks, normal, stored, swallowing
from oracles import BF16, F16, F32, F64
from task_cores import batch, expected, planted

# so that no backend but the one under test can answer
CUDA = {"backend": "cuda"}


def check_gram():
    # past every tile; by 16 bytes along rows and across them, and entry by entry; two slabs
    for rows, d, kind, layout in [
        ([70, 3], 136, "f16", "row-major"),
        ([70, 3], 131, "bf16", "column-major"),
        ([16, 48, 8], 68, "f16", "column-major"),
        ([8], 33, "mixed", "column-major"),
        ([66], 1100, "f32", "strided"),
        ([5], 1024, "mixed", "odd-offset"),
    ]:
        x = blocks(1, rows, d, kind, layout)
        stacked = oracles.stack(x)
        for precision in ("f32", "f64")[: 2 if d < 200 else 1]:
            found = gram(x, precision=precision, **CUDA)
            oracles.assert_within(found, oracles.gram(stacked), oracles.gram_bound(stacked, precision))
    # what a float32 sum over all of a slab would lose
    for dtype in (BF16, F32):
        x = swallowing(1040, dtype)
        stacked = oracles.to_numpy(x)
        oracles.assert_within(gram(x, **CUDA), oracles.gram(stacked), oracles.gram_bound(stacked, "f32"))


def check_combine():
    for rows, d, k, kind, layout in [([40], 150, 66, "f16", "row-major"), ([3, 34], 129, 5, "mixed", "column-major")]:
        x, w = blocks(2, rows, d, kind, layout), normal(3, sum(rows), k)
        stacked, weight = oracles.stack(x), w.numpy()
        for dtype, precision, place in ((F32, "f32", "strided"), (F16, "f64", "row-major")):
            out = stored(torch.full((d, k), float("nan"), dtype=dtype), place)
            [found] = combine_many([(x, w)], dtype=dtype, precision=precision, out=[out], **CUDA)
            bound = oracles.combine_v_bound(stacked, weight, dtype, precision)
            oracles.assert_within(found.v, oracles.combine_v(stacked, weight), bound)
            if place == "strided":
                assert torch.isnan(out._base).sum() == out._base.numel() - out.numel()


def check_sketch():
    for rows, d, width, kind in [
        ([3], 300, 130, "f16"),
        ([9], 1100, 65, "f32"),
        ([66], 70, 7, "bf16"),
        ([66], 136, 7, "bf16"),
    ]:
        x = blocks(4, rows, d, kind)
        stacked = oracles.stack(x)
        for precision in ("f32", "f64"):
            found = sketch(x, width, seed=5, precision=precision, **CUDA)
            oracles.assert_within(
                found, stacked @ oracles.omega(d, width, 5), oracles.sketch_bound(stacked, width, precision)
            )


def check_power():
    x, q = blocks(6, [40, 29], 140, "f16"), normal(7, 69, 5)
    stacked = oracles.stack(x)
    oracles.assert_within(
        power(x, q, **CUDA), oracles.power(stacked, q.numpy()), oracles.power_bound(stacked, q.numpy(), "f32")
    )


def check_reconstruct():
    for dtype, out_dtype, m, k, n, layout in [
        (F16, F16, 70, 72, 72, "row-major"),
        (BF16, F32, 33, 19, 5, "column-major"),
        (F32, BF16, 66, 40, 3, "strided"),
        (F64, F16, 5, 33, 65, "row-major"),
    ]:
        basis, loadings = stored(normal(8, m, k, dtype=dtype), layout), stored(normal(9, k, n, dtype=dtype), layout)
        members = normal(10, 2, m, k, dtype=dtype), normal(11, 2, k, n, dtype=dtype)
        out = stored(torch.full((m, n), float("nan"), dtype=out_dtype), "strided")
        private = torch.empty(m, k, dtype=out_dtype)
        reconstruct_many([Piece(basis, loadings, out, 0.3), Piece(basis, None, private, 0.7)], **CUDA)
        whole = torch.empty(2, m, n, dtype=out_dtype)
        cuda_reconstruct.run([Piece(*members, whole, 0.3)])
        cases = [(out, basis, loadings, 0.3), (private, basis, None, 0.7)]
        cases += [(o, b, l, 0.3) for o, b, l in zip(whole, *members, strict=True)]
        for found, b, l, scale in cases:
            b, l = oracles.to_numpy(b), None if l is None else oracles.to_numpy(l)
            bound = oracles.reconstruct_bound(b, l, scale, out_dtype, F64 if F64 in (dtype, out_dtype) else F32)
            oracles.assert_within(found, oracles.reconstruct(b, l, scale), bound)
        assert torch.isnan(out._base).sum() == out._base.numel() - out.numel()
    # vectors that are whole runs of 16 bytes: pieces on one basis, upright and not, past what one launch takes; a batch
    for dtype, m, k, n in [(F16, 40, 72, 5), (BF16, 17, 24, 18), (F32, 36, 40, 4)]:
        basis, members = normal(20, m, k, dtype=dtype), [normal(21 + i, n, k, dtype=dtype).T for i in range(3)]
        places = [("row-major", "column-major")[i % 2] for i in range(104)]
        outs = [stored(torch.full((m, n), float("nan"), dtype=dtype), place) for place in places]
        reconstruct_many([Piece(basis, members[i % 3], out, 0.3 + i) for i, out in enumerate(outs)], **CUDA)
        whole = torch.empty(2, m, n, dtype=dtype)
        cuda_reconstruct.run([Piece(torch.stack([basis, -basis]), torch.stack(members[:2]), whole, 0.3)])
        cases = [(outs[i], basis, members[i % 3], 0.3 + i) for i in (0, 102, 103)]
        cases += [(whole[0], basis, members[0], 0.3), (whole[1], -basis, members[1], 0.3)]
        for found, b, l, scale in cases:
            b, l = oracles.to_numpy(b), oracles.to_numpy(l)
            bound = oracles.reconstruct_bound(b, l, scale, dtype, F32)
            oracles.assert_within(found, oracles.reconstruct(b, l, scale), bound)


def check_shared_lora():
    counts = [(5, 0, 0, 0), (2, 1, 3, 2), (0, 4, 0, 0), (1, 0, 2, 3)]
    for dtype, rows, n, d, k_out, k_in, layout in [
        (F16, 19, 264, 272, 8, 72, "row-major"),
        (BF16, 5, 37, 67, 9, 5, "strided"),
        (F32, 66, 40, 300, 33, 65, "column-major"),
    ]:
        cores = planted(12, counts, n, d, k_out, k_in, dtype=dtype, dense=[3])
        y, x, v, u = (stored(t, layout) for t in batch(13, rows, n, d, k_out, k_in, dtype))
        tasks = torch.randint(-1, 4, (rows, 2), generator=torch.Generator().manual_seed(14))
        tasks[1], shares = -1, normal(15, rows, 2, dtype=F32)
        y[1] = -0.0
        before, at = y.clone(), torch.arange(rows) != 3
        tasks[3], tasks[3, 1] = -1, 4
        found = shared_lora(y, x, v, u, cores, tasks, shares=shares, scale=0.3, **CUDA)
        # a task that is not there spoils its row and no other
        assert torch.isnan(found[3]).all()
        assert oracles.same_bits(found[1], before[1])
        known = (before[at], x[at], v, u, cores, tasks[at], shares[at], 0.3)
        oracles.assert_within(found[at], *expected(*known))


def check_many_rows():
    # by blocks of 64 rows: one for all slabs of d and one for each, two column tiles of x V; slabs of two turns, where
    # float32 shows the last bit of sums, and few columns, where it shows that g has all of its own
    for dtype, of_y, rows, n, d, k_out, k_in, at_once in [
        (BF16, BF16, 270, 136, 552, 40, 72, False),
        (BF16, BF16, 289, 264, 40, 40, 8, True),
        (F16, F16, 259, 264, 272, 72, 8, True),
        (BF16, F32, 257, 16, 4104, 8, 8, True),
        (BF16, F32, 257, 16, 40, 8, 8, True),
    ]:
        # private left ends are not for the second launch of many
        counts = [(5, 0, 0, 0), (2, 1, 3 * (n == 136), 2 * (n == 136)), (9, 0, 0, 0)]
        cores = planted(16, counts, n, d, k_out, k_in, dtype=dtype)
        y, x, v, u = batch(17, rows, n, d, k_out, k_in, dtype)
        y = y.to(of_y)
        tasks = torch.randint(-1, 3, (rows, 1), generator=torch.Generator().manual_seed(18))
        tasks[256:, 0], tasks[1] = torch.arange(rows - 256) % 3, 3
        with mock.patch.object(cuda_shared_lora, "_ONCE", 1 if at_once else 1000):
            found = shared_lora(y, x, v, u, cores, tasks, scale=0.3, **CUDA)
        assert torch.isnan(found[1]).all()
        # a row's bits are those it has in other company
        few = shared_lora(y[254:], x[254:], v, u, cores, tasks[254:], scale=0.3, **CUDA)
        assert oracles.same_bits(found[254:], few)
        some = torch.arange(rows) % 5 == 2
        known = (y[some], x[some], v, u, cores, tasks[some], None, 0.3)
        oracles.assert_within(found[some], *expected(*known))
    # g of 24 bits that all count, times 1
    one = torch.zeros(1, 8, dtype=BF16)
    one[0, 0] = 1
    basis = torch.cat([one, torch.zeros(7, 8, dtype=BF16)])
    weight = torch.tensor([2 - 2.0**-23])
    cores = Cores.of([[1, 0, 0, 0]], weight, one, one[:0], one, one[:0])
    found = shared_lora(torch.zeros(1, 8), one, basis, basis, cores, torch.zeros(1, dtype=torch.int64), **CUDA)
    assert float(found[0, 0]) == float(weight)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def answer(path, operator, order):
    """Run one operator's cases in a fork and say how it went."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            code = 1
            try:
                found = library.Library(Path(path))
                set_order(found, order)
                library.library = lambda: found
                CHECKS[operator]()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return "ok"
        said.seek(0)
        lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    telling = [line for line in lines if "ERROR: " in line or "runtime error" in line or "Error: " in line]
    return (telling or lines or [f"status {status}"])[-1 if not telling else 0][:300]


def main():
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    for line in sys.stdin:
        sys.stdout.write(answer(*line.split()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
