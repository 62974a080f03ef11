"""What the kernels are compiled for: every row of every configuration table, with the dtypes and forms that meet it.

Launchers look their configuration up in the same tables; tests/kernels/test_triton_compiles.py compiles each of these
for every target with no GPU, and fails where a row of a table is in none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton.language as tl

from loraspan.triton_ops import products, reconstruct, shared_lora, shared_lora_kernels, transposed
from loraspan.triton_ops.launch import compute_type

_POINTERS = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "f64": "*fp64"}


class Build(NamedTuple):
    """One compilation: the kernel, the types of its arguments, its constants; and what has to be in the result."""

    name: str
    kernel: Any
    types: dict[str, str]
    # with num_warps and num_stages
    options: dict[str, Any]
    tensor_cores: bool
    # loads of 16 bytes
    vectors: bool


# (kind and form of the left rows, of the right ones, rows of the larger side, float64 throughout)
_PRODUCTS = (
    (("f16", "rows"), ("f16", "rows"), 1000, False),
    (("bf16", "columns"), ("bf16", "columns"), 1000, False),
    (("bf16", "rows"), ("bf16", "columns"), 16, False),
    (("f16", "rows"), ("signs", "signs"), 1000, False),
    (("bf16", "any"), ("bf16", "any"), 1000, False),
    (("f16", "any"), ("signs", "signs"), 16, False),
    (("f32", "rows"), ("f32", "rows"), 1000, False),
    (("f16", "rows"), ("f32", "columns"), 1000, False),
    (("f64", "rows"), ("signs", "signs"), 16, False),
    (("mixed", "any"), ("mixed", "any"), 1000, False),
    (("mixed", "any"), ("f32", "rows"), 16, False),
    (("f64", "rows"), ("f64", "columns"), 1000, True),
    (("f16", "rows"), ("signs", "signs"), 16, True),
    (("mixed", "any"), ("mixed", "any"), 1000, True),
    (("f16", "any"), ("f64", "rows"), 16, True),
)
# (kind and form of X, of V, columns of W, float64 throughout)
_TRANSPOSED = (
    (("f16", "rows"), ("f16", "rows"), 64, False),
    (("bf16", "columns"), ("f32", "columns"), 16, False),
    (("f32", "rows"), ("f32", "rows"), 64, False),
    (("mixed", "any"), ("bf16", "any"), 64, False),
    (("f16", "any"), ("bf16", "rows"), 16, False),
    (("f64", "rows"), ("f64", "rows"), 64, True),
    (("f16", "rows"), ("f16", "rows"), 16, True),
    (("mixed", "any"), ("f32", "rows"), 64, True),
    (("f32", "any"), ("f64", "any"), 16, True),
)
# (kind and form of basis, of loadings, of out, columns of out)
_RECONSTRUCT = (
    (("f16", "rows"), ("f16", "rows"), ("f16", "rows"), 64),
    (("bf16", "rows"), ("bf16", "columns"), ("bf16", "rows"), 16),
    (("bf16", "any"), ("bf16", "any"), ("f32", "any"), 64),
    (("f32", "rows"), ("f32", "rows"), ("f32", "rows"), 64),
    (("f16", "rows"), ("f32", "any"), ("f16", "columns"), 16),
    (("f16", "rows"), ("f64", "rows"), ("bf16", "rows"), 64),
    (("f64", "columns"), ("f32", "rows"), ("f64", "rows"), 16),
    (("f16", "rows"), None, ("f32", "rows"), 64),
    (("f64", "columns"), None, ("bf16", "columns"), 16),
)
# (kind and form of y and x, of the bases, of the tables of ends, k_in, k_out, rows)
_SHARED_LORA = (
    (("f16", "rows"), ("f16", "rows"), ("f16", "rows"), 64, 64, 1),
    (("bf16", "rows"), ("bf16", "rows"), ("f32", "rows"), 64, 64, 4096),
    (("bf16", "rows"), ("bf16", "columns"), ("bf16", "rows"), 512, 512, 64),
    (("f32", "rows"), ("f32", "rows"), ("f32", "rows"), 64, 64, 64),
    (("f32", "rows"), ("f16", "rows"), ("bf16", "rows"), 32, 64, 512),
    (("f16", "any"), ("f32", "any"), ("f16", "any"), 32, 128, 512),
    (("f64", "rows"), ("f64", "rows"), ("f64", "rows"), 64, 64, 64),
    (("f64", "rows"), ("f32", "columns"), ("f16", "rows"), 128, 16, 512),
    # products of float64 of which one side is read in half precision
    (("bf16", "rows"), ("f16", "rows"), ("f64", "rows"), 64, 64, 64),
    (("f64", "columns"), ("bf16", "columns"), ("f32", "rows"), 64, 128, 512),
    (("f32", "any"), ("bf16", "any"), ("f64", "any"), 16, 16, 16),
)


def builds(architecture: str) -> Iterator[Build]:
    """Give all of them, with the configurations of an architecture."""
    yield from (_products(architecture, *case) for case in _PRODUCTS)
    types = dict.fromkeys(("units", "jobs"), "*i64")
    for many, tile in products.ADD_TILES.items():
        yield Build(f"add {'many' if many else 'few'}", products.add_kernel, types, tile, False, False)
    yield from (_transposed(*case) for case in _TRANSPOSED)
    for case in _RECONSTRUCT:
        yield from _reconstruct(*case)
    for case in _SHARED_LORA:
        yield from _shared_lora(architecture, *case)


def _name(kernel: str, *parts: tuple[str, str] | None) -> str:
    return " ".join([kernel, *("-".join(part) for part in parts if part)])


def _products(architecture: str, left: tuple[str, str], right: tuple[str, str], rows: int, wide: bool) -> Build:
    compute = compute_type([left[0]] if right[0] == "signs" else [left[0], right[0]], wide)
    singly = "any" in (left[1], right[1])
    tile = products.tile_of(compute, singly, rows, architecture)
    types = dict.fromkeys(("units", "jobs", "rows"), "*i64")
    types |= dict.fromkeys(("total", "seed_low", "seed_high"), "i64")
    return Build(
        _name("products", left, right) + f" {rows} {compute.name}",
        products.products_kernel,
        types,
        products.options((*left, *right, compute, tile)),
        compute in (tl.float16, tl.bfloat16, tl.float64),
        # float64 of half precision takes fewer entries at a time than 16 bytes hold
        not singly and not (wide and left[0] != "f64"),
    )


def _transposed(x: tuple[str, str], v: tuple[str, str], columns: int, wide: bool) -> Build:
    compute = compute_type([x[0], "f32"], wide)
    tile = transposed.tile_of(compute, x[1] == "any", columns)
    types = dict.fromkeys(("units", "jobs", "rows"), "*i64")
    types |= {"total": "i64", "weights": "*fp64" if wide else "*fp32"}
    options = transposed.options((*x, *v, compute, tile))
    name = _name("transposed", x, v) + f" {columns} {compute.name}"
    vectors = x[1] != "any" and not (wide and x[0] != "f64")
    return Build(name, transposed.transposed_kernel, types, options, wide, vectors)


def _reconstruct(
    basis: tuple[str, str], loadings: tuple[str, str] | None, out: tuple[str, str], columns: int
) -> Iterator[Build]:
    kinds = [part[0] for part in (basis, loadings, out) if part is not None]
    wide = "f64" in kinds
    compute = reconstruct.compute_of(kinds, loadings is not None)
    tile = reconstruct.tile_of(compute, loadings is not None, columns)
    variant = reconstruct.Variant(*basis, *(loadings or ("none", "any")), *out, compute, tile)
    options = reconstruct.options(variant)
    name = _name("reconstruct", basis, loadings, out) + f" {columns}"
    one = dict.fromkeys(reconstruct.NUMBERS, "i64")
    one |= {"basis": _POINTERS[kinds[0]], "loadings": _POINTERS[(loadings or basis)[0]], "out": _POINTERS[kinds[-1]]}
    cores = loadings is not None and compute != tl.float32
    vectors = basis[1] != "any" and not (wide and "f16" in kinds)
    yield Build(f"{name} one", reconstruct.piece_kernel, one, options, cores, vectors)
    # the same tile of the same kernel body: what differs is where its numbers come from
    if columns == 64:
        many = dict.fromkeys(("units", "jobs"), "*i64")
        yield Build(f"{name} many", reconstruct.pieces_kernel, many, options, cores, vectors)


def _shared_lora(
    architecture: str,
    data: tuple[str, str],
    bases: tuple[str, str],
    ends: tuple[str, str],
    k_in: int,
    k_out: int,
    rows: int,
) -> Iterator[Build]:
    wide = "f64" in (data[0], bases[0], ends[0])
    compute = compute_type([data[0], bases[0]], wide)
    singly = "any" in (data[1], bases[1], ends[1])
    tile = shared_lora.tile_of(compute, rows, singly)
    expansion = shared_lora.expansion_of(wide, singly or k_in > 64, ends[0], architecture)
    variant = shared_lora.Variant(
        *data, *data, *bases, *bases, *ends, compute, k_in, min(k_out, 64), k_out <= 64, rows > 64, tile, expansion
    )
    name = _name("shared_lora", data, bases, ends) + f" {k_in} {k_out} {rows} {compute.name}"
    own, end, integers = _POINTERS[data[0]], _POINTERS[ends[0]], dict.fromkeys(("index", "tasks"), "*i64")
    sums = {"sums": "*fp64" if wide else "*fp32"}
    vectors = bases[1] != "any" and not (wide and data[0] != "f64")

    shrink = {"x": own, "v": _POINTERS[bases[0]], "right_private": end} | integers | sums
    shrink |= dict.fromkeys(shared_lora_kernels.SHRINK_NUMBERS, "i64")
    options = shared_lora.shrink_options(variant)
    yield Build(f"{name} shrink", shared_lora_kernels.shrink_kernel, shrink, options, compute != tl.float32, vectors)

    expand = {"y": own, "u": _POINTERS[bases[0]], "weights": "*fp32", "shares": "*fp32"} | integers | sums
    expand |= dict.fromkeys(("left", "left_private", "right"), end)
    expand |= dict.fromkeys(shared_lora_kernels.EXPAND_NUMBERS, "i64")
    # g is of float32 and goes to the tensor cores in parts
    yield Build(
        f"{name} expand",
        shared_lora_kernels.expand_kernel,
        expand,
        shared_lora.expand_options(variant, architecture),
        True,
        vectors,
    )
