"""The operators: each one file with its signature, its checks, a plain reference and a table of backends."""

from loraspan.ops.blocks import RowBlocks
from loraspan.ops.combine import Combined, combine, combine_many
from loraspan.ops.cores import Cores
from loraspan.ops.gram import gram, gram_many
from loraspan.ops.packed import Packed, pack, unpack
from loraspan.ops.packed_products import PackedProducts, packed_products
from loraspan.ops.reconstruct import Piece, reconstruct, reconstruct_many
from loraspan.ops.shared_lora import shared_lora, shared_lora_
from loraspan.ops.sketch import power, power_many, sketch, sketch_many
from loraspan.ops.sparse_sketch import sparse_sketch
from loraspan.ops.squares import squares

__all__ = [
    "Combined",
    "Cores",
    "Packed",
    "PackedProducts",
    "Piece",
    "RowBlocks",
    "combine",
    "combine_many",
    "gram",
    "gram_many",
    "pack",
    "packed_products",
    "power",
    "power_many",
    "reconstruct",
    "reconstruct_many",
    "shared_lora",
    "shared_lora_",
    "sketch",
    "sketch_many",
    "sparse_sketch",
    "squares",
    "unpack",
]
