"""Adapter folders written byte by byte, so that they may also be wrong."""

import json

import torch

from loraspan.adapters import Adapter, Slot, Source

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "v"], "base_model_name_or_path": "base"}
PREFIX = "base_model.model."
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8"}


def factors(path="layers.0.q", r=2, d=5, n=3, seed=3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{path}.lora_A.weight": torch.randn(r, d, generator=rng).to(dtype),
        f"{PREFIX}{path}.lora_B.weight": torch.randn(n, r, generator=rng).to(dtype),
    }


def header_of(tensors):
    fields, at = {}, 0
    for name, tensor in tensors.items():
        fields[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    return fields


def data_of(tensors):
    return b"".join(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) for tensor in tensors.values())


def file_of(header, data):
    raw = header
    if not isinstance(raw, bytes):
        raw = json.dumps(header).encode()
        # as safetensors does, so that the data is aligned
        raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def write(folder, tensors=None, config=None, file=None):
    folder.mkdir(parents=True)
    tensors = factors() if tensors is None else tensors
    text = config if isinstance(config, (bytes, str)) else json.dumps(CONFIG if config is None else config)
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "adapter_model.safetensors").write_bytes(file or file_of(header_of(tensors), data_of(tensors)))
    return folder


def adapter(name="sql", d=5, n=3, kind="linear", base=None, path="layers.0.q", **slot):
    rng = torch.Generator().manual_seed(11)
    one = Slot(torch.randn(2, d, generator=rng), torch.randn(n, 2, generator=rng), 1.7, kind, **slot)
    return Adapter(name, {path: one}, config={}, source=Source(base_model=base))
