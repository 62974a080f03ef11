"""What compiled code leaves out of its graphs. Import it where a graph is being made: it takes the compiler along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="a compiled graph reads no tasks context: call the compiled model with task_ids=space.ids(...), -1 for none"
)
def outside(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as eager code, between two graphs; a whole graph is refused, with the remedy."""
    return function(*args)
