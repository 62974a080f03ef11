"""Packed rows are read where they lie: peaks of resident memory, against what unpacking all of them would take."""

from pathlib import Path

import pytest
import torch

from loraspan.ops import Cores, Packed, Piece, packed_products, reconstruct_many, shared_lora_

ROWS, LENGTH = 64, 1 << 19
FULL = 4 * ROWS * LENGTH
PEAK = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(not PEAK.exists(), reason="only Linux tells and resets the peak of resident memory")


def peak_above(call):
    """Give the bytes by which the peak of resident memory rises over what is resident before."""

    def read(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    PEAK.write_text("5")
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def packed(bits):
    codes = torch.full((ROWS, LENGTH * bits // 8), 0x3A, dtype=torch.uint8)
    return Packed(codes, torch.ones(ROWS, LENGTH // 64, dtype=torch.float16), LENGTH, bits)


def calls(basis):
    """Name what reads a packed basis, each call with results of a few vectors."""
    y, x = torch.zeros(2, LENGTH), torch.ones(2, LENGTH)
    out, ends, eye = torch.empty(LENGTH, 1), torch.ones(1, ROWS), torch.eye(ROWS)
    none, first = torch.empty(0, LENGTH), basis.rows(0, 1)
    shared = Cores.of([(1, 0, 0, 0)] * ROWS, torch.ones(ROWS), eye, none, eye, none)
    private = Cores.of([(0, 0, 0, 1)] * ROWS, torch.ones(ROWS), ends[:0], basis, ends[:0], basis)
    # mixtures: for a row of one task, or many rows of it, its own few columns are rebuilt instead
    tasks = torch.tensor([[0, ROWS - 1]] * 2)
    yield "reconstruct", lambda: reconstruct_many([Piece(basis, ends.T, out)])
    yield "bases", lambda: shared_lora_(y, x, basis, basis, shared, tasks)
    yield "private ends", lambda: shared_lora_(y, x, first, first, private, tasks)
    yield "products", lambda: packed_products([x], basis)


def test_an_unpacked_copy_would_be_seen():
    """The yardstick: unpacking once costs what the calls below must not."""
    assert peak_above(lambda: torch.ones(ROWS, LENGTH)) > 0.9 * FULL


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_no_unpacked_copy_is_made(bits):
    for name, call in calls(packed(bits)):
        # room for x and y twice, and for the scratch of threads
        rise = peak_above(call)
        assert rise < FULL / 8, f"{name}: {rise >> 20} MB, {FULL >> 20} unpacked"
