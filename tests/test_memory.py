"""Huge pages are asked for behind large results, and behind nothing else."""

import re
import sys
from pathlib import Path

import pytest
import torch

from loraspan import _native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def advised(tensor):
    """Whether huge pages were asked for where the middle of a tensor lies: the flag ``hg`` of its mapping."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"nothing is mapped at {middle:#x}")


def test_large_results_ask_for_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this system has no transparent huge pages")
    large = torch.empty(64 << 20, dtype=torch.uint8)
    assert not advised(large)

    assert _native.in_huge_pages(large) is large

    assert advised(large)


def test_small_results_and_others_are_left_alone():
    for tensor in (torch.empty(0), torch.empty(1 << 20, dtype=torch.uint8), torch.empty(9 << 20, device="meta")):
        assert _native.in_huge_pages(tensor) is tensor
