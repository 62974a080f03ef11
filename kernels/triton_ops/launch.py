"""What every launcher needs: where Triton runs here, tables on the device by one copy, the current device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

# TRITON_INTERPRET=1 as triton read it; its interpreter multiplies the bit patterns of bfloat16 in tl.dot
INTERPRETING: bool = bool(triton.knobs.runtime.interpret)

KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
_TYPES = {"f16": tl.float16, "bf16": tl.bfloat16, "f32": tl.float32, "f64": tl.float64}
_OLDEST = (8, 0)


def refuses(devices: Iterable[torch.device | None]) -> str | None:
    """Say why kernels cannot reach tensors on these devices, if they cannot; None stands for no tensor."""
    found = {device for device in devices if device is not None}
    kind = "cpu" if INTERPRETING else "cuda"
    for device in found:
        if device.type != kind:
            here = (
                "Triton interprets (TRITON_INTERPRET=1) and reads CPU memory"
                if INTERPRETING
                else ("it runs on CUDA devices, or on the CPU where Triton interprets (TRITON_INTERPRET=1)")
            )
            return f"tensors are on {device}; {here}"
        if device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < _OLDEST:
                return f"{device} has compute capability {capability[0]}.{capability[1]}; it needs 8.0"
    if len(found) > 1:
        return f"tensors are on several devices: {', '.join(sorted(map(str, found)))}"
    return None


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def architecture_of(device: torch.device) -> str:
    """Give the column of the configuration tables that is for this device."""
    if device.type != "cuda":
        return "any"
    if torch.version.hip is not None:
        return "hip"
    return "sm90" if torch.cuda.get_device_capability(device) >= (9, 0) else "any"


def compute_type(kinds: Sequence[str], wide: bool) -> tl.dtype:
    """Give the type that products are made in: half precision on tensor cores where all factors have it.

    Products of two half-precision numbers are exact in the float32 that they are summed in. All else is float32 with
    IEEE products, or float64 where ``wide``.
    """
    if wide:
        return tl.float64
    if len(set(kinds)) > 1 or kinds[0] not in ("f16", "bf16") or (kinds[0] == "bf16" and INTERPRETING):
        return tl.float32
    return _TYPES[kinds[0]]


def upload(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """Give int64 arrays on ``device``, flat, by one copy; each begins at a multiple of 16 bytes."""
    sizes = [array.size + array.size % 2 for array in arrays]
    memory = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    host = memory.numpy()
    for array, start in zip(arrays, np.cumsum([0, *sizes]), strict=False):
        host[start : start + array.size] = array.ravel()
    return list(torch.split(memory.to(device, non_blocking=True), sizes))
