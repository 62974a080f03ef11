"""The folder on disk: format, transactions, verification."""

from loraspan.store.format import Finding
from loraspan.store.garbage import Garbage, gc
from loraspan.store.history import Entry, log, rollback
from loraspan.store.manifest import Change
from loraspan.store.opened import Opened, nbytes, open, open_at
from loraspan.store.pins import pin
from loraspan.store.plan import forecast
from loraspan.store.transaction import commit, save
from loraspan.store.verify import verify

__all__ = [
    "Change",
    "Entry",
    "Finding",
    "Garbage",
    "Opened",
    "commit",
    "forecast",
    "gc",
    "log",
    "nbytes",
    "open",
    "open_at",
    "pin",
    "rollback",
    "save",
    "verify",
]
