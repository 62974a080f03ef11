"""The folder on disk: format, transactions, verification."""

from loraspan.store.format import Finding
from loraspan.store.reader import open
from loraspan.store.transaction import save
from loraspan.store.verify import verify

__all__ = ["Finding", "open", "save", "verify"]
