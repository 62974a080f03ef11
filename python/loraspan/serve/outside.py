"""What compiled code leaves out of its graphs. Import it where a graph is being made: it takes the compiler along."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

_REASON = "a compiled graph reads no tasks context: call the compiled model with task_ids=space.ids(...), -1 for none"
# older versions of torch give no reasons, or have no way to refuse a break
_SAID = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
_STRICT = getattr(torch._dynamo, "error_on_graph_break", None)


@torch.compiler.disable(**_SAID)  # type: ignore[no-untyped-call, untyped-decorator]
def outside(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as eager code, between two graphs; a whole graph is refused, with the remedy."""
    return function(*args)


def whole() -> contextlib.AbstractContextManager[Any]:
    """Refuse graphs that break within."""
    return contextlib.nullcontext() if _STRICT is None else _STRICT(True)
