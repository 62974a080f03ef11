"""LoRA adapters of one base model in one shared low-rank subspace: compressed fast, rebuilt exactly."""

from loraspan import errors, linalg, ops
from loraspan.serve.attach import attach
from loraspan.serve.bake import bake
from loraspan.subspace import Subspace, compress, open

__all__ = ["Subspace", "attach", "bake", "compress", "errors", "linalg", "open", "ops"]
