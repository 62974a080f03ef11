"""Collections of more adapters than fit in memory, group after group, to be continued after any interruption."""

from loraspan.many.census import Aside
from loraspan.many.compress import ManyReport, compress_many

__all__ = ["Aside", "ManyReport", "compress_many"]
