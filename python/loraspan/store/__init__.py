"""The folder on disk: format, transactions, verification."""

from loraspan.store.format import Finding
from loraspan.store.opened import Opened, open, open_at
from loraspan.store.transaction import commit, save
from loraspan.store.verify import verify

__all__ = ["Finding", "Opened", "commit", "open", "open_at", "save", "verify"]
