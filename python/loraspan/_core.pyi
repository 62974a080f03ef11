"""The compiled kernels: addresses, sizes and strides in, results written to the addresses given."""

import enum

import numpy as np
from numpy.typing import NDArray

class Precision(enum.Enum):
    f32 = 0
    f64 = 1

class Arithmetic(enum.Enum):
    f32 = 0
    f64 = 1
    bf16 = 2

class Traffic(enum.Enum):
    read = 0
    write = 1
    stream = 2
    copy = 3

def instruction_sets() -> list[tuple[str, bool, bool]]: ...
def gram(blocks: NDArray[np.int64], jobs: NDArray[np.int64], precision: Precision, threads: int, isa: str) -> None: ...
def combine(
    blocks: NDArray[np.int64], jobs: NDArray[np.int64], precision: Precision, threads: int, isa: str
) -> None: ...
def sketch(
    blocks: NDArray[np.int64], jobs: NDArray[np.int64], precision: Precision, threads: int, isa: str
) -> None: ...
def power(blocks: NDArray[np.int64], jobs: NDArray[np.int64], precision: Precision, threads: int, isa: str) -> None: ...
def reconstruct(jobs: NDArray[np.int64], scales: list[float], threads: int, isa: str) -> None: ...
def eigh(a: int, count: int, n: int, values: int, vectors: int, threads: int, isa: str) -> None: ...
def svd(a: int, count: int, m: int, n: int, u: int, s: int, v: int, threads: int, isa: str) -> None: ...
def root(gram: int, count: int, n: int, r: int, inverse: int, threads: int, isa: str) -> None: ...
def arithmetic(kind: Arithmetic, repetitions: int, threads: int, isa: str) -> float: ...
def traffic(kind: Traffic, to: int, from_: int, bytes: int, threads: int, isa: str) -> None: ...
