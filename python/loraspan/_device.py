"""The backends that run on a GPU: which there are, which comes first and why, imported when one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from loraspan._dispatch import Backend

# Which of the two is tried first on a CUDA device, and why.
ORDER = {
    # A fit calls these a few times on shapes of its own, and what is built beforehand keeps nobody waiting for a
    # compiler, which takes a second for each variant. On an H100 CUDA takes a quarter of Triton's time for Grams of
    # float32 rows, two fifths for sketches of them and two thirds for power steps; Triton two thirds of CUDA's for half
    # precision and for combine. All of these are a tenth of a call or less.
    "gram": ("cuda", "triton"),
    "combine": ("cuda", "triton"),
    "sketch": ("cuda", "triton"),
    "power": ("cuda", "triton"),
    # on an H100 calls of thousands of pieces take a quarter of Triton's time, and kernels as long in half precision and
    # three fifths in float32
    "reconstruct": ("cuda", "triton"),
    # A model calls this for ever: on an H100 kernels for 64 rows take 14 us in bfloat16 and 17 us in Triton, 21 and 24
    # in float32, for 1024 rows 43 and 65, and a whole call between a fifth and two thirds of Triton's time.
    "shared_lora": ("cuda", "triton"),
}
# the module of each package that has an operator, where it is not named as the operator is
_ROOMS = {"power": "sketch"}
_PACKAGES = {"cuda": "loraspan._cuda", "triton": "loraspan.triton_ops"}


def backends(operator: str, *, form: str = "") -> list[Backend[Callable[..., Any]]]:
    """Give the GPU backends of an operator in their order.

    Module ``<package>.<operator>`` has ``run``, which takes what the operator's table hands to every backend, and
    ``refuses``, which takes what the operator's ``refuses`` does and gives a reason in words or None. ``form`` names
    another pair in the same module, such as ``batch`` for ``run_batch`` and ``refuses_batch``.
    """
    return [
        Backend(name, partial(_run, name, operator, form), partial(_refuses, name, operator, form))
        for name in ORDER[operator]
    ]


def _run(name: str, operator: str, form: str, *args: Any) -> Any:
    return _find(name, operator, "run", form)(*args)


def _refuses(name: str, operator: str, form: str, *args: Any) -> str | None:
    try:
        refuses = _find(name, operator, "refuses", form)
    except ImportError as error:
        return f"{error.name or _PACKAGES[name]} is not installed"
    reason: str | None = refuses(*args)
    return reason


def _find(name: str, operator: str, verb: str, form: str) -> Callable[..., Any]:
    room = importlib.import_module(f"{_PACKAGES[name]}.{_ROOMS.get(operator, operator)}")
    part = form or (operator if operator in _ROOMS else "")
    found: Callable[..., Any] = getattr(room, f"{verb}_{part}" if part else verb)
    return found
