"""Do adapters belong together, and are their numbers finite?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loraspan.adapters import experts
from loraspan.adapters.base import Adapter, Slot
from loraspan.adapters.keys import factor_keys
from loraspan.errors import MismatchError

_CHUNK = 1 << 20


def check_together(adapters: Iterable[Adapter]) -> None:
    """Refuse adapters of different base models, or with slots of one name that are different maps.

    Base models are compared by the names that the adapters give, where both give one, apart from slashes at the end.
    Adapters may cover different slots.

    Raises:
        MismatchError: naming two adapters and what differs.

    Example:
        >>> import torch
        >>> def adapter(name, d):
        ...     return Adapter(name, {"q": Slot(torch.ones(2, d), torch.ones(3, 2), 1.0)})
        >>> check_together([adapter("sql", 5), adapter("legal", 7)])
        Traceback (most recent call last):
        ...
        loraspan.errors.MismatchError: adapters 'sql' and 'legal' do not belong together: slot 'q' is linear [3, 5]
        in the first and linear [3, 7] in the second
    """
    base: tuple[str, Adapter] | None = None
    first: dict[str, tuple[tuple[object, ...], Adapter]] = {}
    for adapter in adapters:
        name = (adapter.source.base_model or "").rstrip("/")
        if name:
            base = base or (name, adapter)
            if base[0] != name:
                raise _mismatch(base[1], adapter, f"the first is for base model {base[0]!r}, the second for {name!r}")
        for path, slot in adapter.slots.items():
            seen = (slot.shape, slot.kind, slot.kernel)
            known, owner = first.setdefault(path, (seen, adapter))
            if known != seen:
                what = f"slot {path!r} is {_say(owner.slots[path])} in the first and {_say(slot)} in the second"
                raise _mismatch(owner, adapter, what)


def find_not_finite(adapter: Adapter) -> tuple[str, str, str] | None:
    """Find a factor that holds a NaN or an infinity.

    Every factor is read, in pieces of a few MB. Meant for naming the culprit once a sum over many came out not finite.

    Returns:
        The slot's path, ``"down"`` or ``"up"``, and the name that the tensor has in a PEFT file;
        None if all are finite.

    Example:
        >>> import torch
        >>> broken = torch.tensor([[1.0, float("nan")]])
        >>> find_not_finite(Adapter("sql", {"q": Slot(broken, torch.ones(3, 1), 1.0)}))
        ('q', 'down', 'base_model.model.q.lora_A.weight')
    """
    for path, slot in adapter.slots.items():
        for role, factor in (("down", slot.down), ("up", slot.up)):
            if not _is_finite(factor):
                return path, role, _key(adapter, path, slot.kind, role)
    return None


def _is_finite(factor: Tensor) -> bool:
    # along the axis that is stored in whole rows, so that no piece is gathered from all over the file
    rows = factor if factor.stride(0) >= factor.stride(1) else factor.T
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    return all(bool(torch.isfinite(rows[at : at + step]).all()) for at in range(0, rows.shape[0], step))


def _key(adapter: Adapter, path: str, kind: str, role: str) -> str:
    file_path = experts.file_path_of(path, adapter.config.get("target_parameters") or []) if kind == "expert" else path
    return getattr(factor_keys(file_path, kind), role)  # type: ignore[no-any-return]


def _mismatch(one: Adapter, other: Adapter, what: str) -> MismatchError:
    return MismatchError(f"adapters {one.name!r} and {other.name!r} do not belong together: {what}")


def _say(slot: Slot) -> str:
    return f"{slot.kind} {list(slot.shape)}" + (f" with kernel {list(slot.kernel)}" if slot.kernel else "")
