"""Check an installed loraspan, away from its checkout: it imports, computes on every backend, uses one thread pool."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

import loraspan
from loraspan import _native
from loraspan.ops import gram

MAPS = Path("/proc/self/maps")


def check_location() -> None:
    """The package that answers is the installed one, with its types."""
    package = Path(loraspan.__file__).parent
    if not package.is_relative_to(sys.prefix):
        sys.exit(f"loraspan comes from {package}, which is not in this environment, {sys.prefix}")
    for name in ("py.typed", "_core.pyi"):
        if not (package / name).is_file():
            sys.exit(f"{package}: lacks {name}")
    print(f"loraspan {version('loraspan')} in {package}, torch {torch.__version__}")


def check_gram() -> None:
    """Every instruction set that this processor runs gives a Gram within its bound."""
    x = torch.randn(33, 700, generator=torch.Generator().manual_seed(20261122))
    exact = x.double() @ x.double().T
    bound = 130 * 2.0**-24 * (x.double().abs() @ x.double().abs().T)
    for name, built, supported in _native.INSTRUCTION_SETS:
        if not (built and supported):
            continue
        excess = ((gram(x, backend=f"cpu:{name}") - exact).abs() / bound).max().item()
        if not excess <= 1:
            sys.exit(f"gram on cpu:{name}: {excess:.3g} times its error bound")
        print(f"gram on cpu:{name}: {excess:.3g} of its error bound")


def check_thread_pool() -> None:
    """The process has one libgomp: torch's and the kernels' threads are the same."""
    if not MAPS.exists():
        return
    pools = {line.split()[-1] for line in MAPS.read_text().splitlines() if "gomp" in line}
    if len(pools) > 1:
        sys.exit(f"the process has {len(pools)} OpenMP pools: {', '.join(sorted(pools))}")
    print(f"OpenMP pool: {', '.join(pools) or 'none'}")


if __name__ == "__main__":
    check_location()
    check_gram()
    check_thread_pool()
