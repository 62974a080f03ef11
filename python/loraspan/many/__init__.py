"""Collections of more adapters than fit in memory, group after group, and adapters that are set aside."""

from loraspan.many.aside import Aside, nobody_left, read_or_set_aside, set_not_finite_aside
from loraspan.many.compress import compress_in_groups

__all__ = ["Aside", "compress_in_groups", "nobody_left", "read_or_set_aside", "set_not_finite_aside"]
