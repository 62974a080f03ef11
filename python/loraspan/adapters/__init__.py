"""Adapter files of other libraries, in and out, and nothing else."""

from loraspan.adapters.base import KINDS, Adapter, Slot, Source
from loraspan.adapters.check import check_together, find_not_finite
from loraspan.adapters.sources import read_all, resolve

__all__ = ["KINDS", "Adapter", "Slot", "Source", "check_together", "find_not_finite", "read_all", "resolve"]
