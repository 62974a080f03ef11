"""Other ways to keep the adapters of ``benches/fidelity.py``: each gives bytes, and the factors that come back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _fidelity_cases import Factors
from loraspan.adapters import Adapter
from loraspan.collection.headers import Entry, header
from loraspan.collection.rows import Width, row_bytes, store_rows, tensors_of, values_of

WIDTHS: dict[str, Width] = {"f16": torch.float16, "8 bits": 8, "4 bits": 4}
# the least that says what the factors are
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
RANDOM_RANKS = (8, 32)
# of a task's norm, at most
DROPPED = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)

Spectrum = tuple[Tensor, Tensor, Tensor]
"""``u [r, n]``, ``s [r]`` and ``v [r, d]`` of a slot's ``dW``: singular vectors as rows, float64."""


class Kept(NamedTuple):
    """A collection kept in one way: what it takes, in folders too where that is more, and what comes back of tasks."""

    way: str
    nbytes: int
    rebuilt: list[Factors]
    folders: int | None = None


def svds(adapters: Sequence[Adapter]) -> Iterator[Kept]:
    """Give every adapter's own truncated SVD: at one rank everywhere, or with ranks of its own over its slots."""
    spectra = [{path: _svd(slot) for path, slot in adapter.slots.items()} for adapter in adapters]
    names = [adapter.name for adapter in adapters]
    widest = max(len(s) for of in spectra for _, s, _ in of.values())
    for width in WIDTHS:
        for rank in sorted({1, 2, 3, widest // 2, 3 * widest // 4, widest}):
            ranks = [{path: min(rank, len(s)) for path, (_, s, _) in of.items()} for of in spectra]
            yield _kept(f"SVD {width}, rank {rank}", names, spectra, ranks, width)
        for share in DROPPED:
            ranks = [_by_energy(of, share, width) for of in spectra]
            yield _kept(f"SVD {width}, {share:g} dropped", names, spectra, ranks, width)


def controls(adapters: Sequence[Adapter]) -> Iterator[Kept]:
    """Give bases drawn at random, and the mean of all ``dW``, for everyone."""
    for rank in RANDOM_RANKS:
        yield _random_basis(adapters, rank)
    dense = {path: sum(map(_delta, (a.slots[path] for a in adapters))) / len(adapters) for path in adapters[0].slots}
    mean = {path: (delta.half().double(), torch.eye(delta.shape[1]).double()) for path, delta in dense.items()}
    yield Kept("mean", sum(2 * delta.numel() for delta in dense.values()), [mean] * len(adapters))


def _svd(slot: object) -> Spectrum:
    q, r = torch.linalg.qr(slot.up.double())
    p, t = torch.linalg.qr(slot.down.double().T)
    u, s, vh = torch.linalg.svd(slot.scale * r @ t.T)
    return (q @ u).T, s, vh @ p.T


def _delta(slot: object) -> Tensor:
    return slot.scale * slot.up.double() @ slot.down.double()


def _kept(
    way: str, names: Sequence[str], spectra: Sequence[dict[str, Spectrum]], ranks: Sequence[dict[str, int]], width: str
) -> Kept:
    """Count one file for everybody, with a tensor per slot and side and a byte per rank; and a PEFT folder each."""
    rebuilt: list[Factors] = [{} for _ in spectra]
    together: list[Entry] = [("ranks", torch.uint8, [len(spectra), len(spectra[0])])]
    alone: list[list[Entry]] = [[] for _ in spectra]
    for path in spectra[0]:
        ends = []
        for side, letter in ((0, "B"), (2, "A")):
            parts = [
                of[path][1][: k[path], None].sqrt() * of[path][side][: k[path]]
                for of, k in zip(spectra, ranks, strict=True)
            ]
            held = store_rows(torch.cat(parts), WIDTHS[width])
            ends.append(values_of(held).double().split([len(part) for part in parts]))
            for name, tensor in tensors_of(letter, path, held):
                together.append((name, tensor.dtype, tensor.shape))
                for entries, part in zip(alone, parts, strict=True):
                    entries.append((f"base_model.model.{name}.weight", tensor.dtype, [len(part), *tensor.shape[1:]]))
        for factors, left, right in zip(rebuilt, *ends, strict=True):
            factors[path] = left.T, right
    nbytes = _file_bytes(together, {"names": json.dumps(names), "config": json.dumps(CONFIG)})
    folders = sum(_file_bytes(entries, {}) + len(json.dumps(CONFIG)) for entries in alone)
    return Kept(way, nbytes, rebuilt, folders)


def _file_bytes(entries: Sequence[Entry], metadata: dict[str, str]) -> int:
    data = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries)
    return len(header(entries, metadata)) + data


def _by_energy(of: dict[str, Spectrum], share: float, width: str) -> dict[str, int]:
    """Drop columns, the least energy per byte first, until ``share`` of the norm is gone."""
    columns = [
        (float(x) ** 2 / sum(row_bytes(side.shape[1], WIDTHS[width]) for side in (u, v)), float(x) ** 2, path)
        for path, (u, s, v) in of.items()
        for x in s
    ]
    budget = share**2 * sum(energy for _, energy, _ in columns)
    kept = {path: len(s) for path, (_, s, _) in of.items()}
    for _, energy, path in sorted(columns):
        budget -= energy
        if budget < 0:
            break
        kept[path] -= 1
    return kept


def _random_basis(adapters: Sequence[Adapter], rank: int) -> Kept:
    draw = torch.Generator().manual_seed(0)
    rebuilt: list[Factors] = [{} for _ in adapters]
    nbytes = 0
    for path, first in adapters[0].slots.items():
        u, v = (torch.linalg.qr(torch.randn(m, min(rank, m), generator=draw))[0].half().double() for m in first.shape)
        nbytes += 2 * (u.numel() + v.numel())
        for factors, adapter in zip(rebuilt, adapters, strict=True):
            slot = adapter.slots[path]
            # float64 loadings: this control shall not lose by rounding
            left, right = u.T @ slot.up.double(), slot.scale * slot.down.double() @ v
            factors[path] = u @ left, right @ v.T
            nbytes += 2 * (left.numel() + right.numel())
    return Kept(f"random basis {rank}", nbytes, rebuilt)
