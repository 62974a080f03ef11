"""Check that the one wheel and the one sdist of a folder hold what they should: ``check_dist.py DIST``."""

import sys
import tarfile
import zipfile
from pathlib import Path

WHEEL_NEEDS = ("loraspan/__init__.py", "loraspan/py.typed", "loraspan/_core.pyi", "loraspan/_core.*.so", "*/LICENSE")
SDIST_NEEDS = ("pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "csrc/bindings/module.cpp", "tests/*.py")


def missing(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """Give the patterns that no name matches."""
    return [pattern for pattern in patterns if not any(Path(name).match(pattern) for name in names)]


def main(folder: Path) -> None:
    """Exit with a message on the first archive that lacks something."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        wheel_names = archive.namelist()
    with tarfile.open(sdist) as archive:
        sdist_names = archive.getnames()
    for path, names, patterns in ((wheel, wheel_names, WHEEL_NEEDS), (sdist, sdist_names, SDIST_NEEDS)):
        if lacking := missing(names, patterns):
            sys.exit(f"{path.name}: lacks {', '.join(lacking)}; it has {len(names)} files")
        print(f"{path.name}: {len(names)} files, {path.stat().st_size / 1e6:.2f} MB")
    if foreign := [name for name in wheel_names if not name.startswith("loraspan")]:
        sys.exit(f"{wheel.name}: puts files outside the package: {', '.join(foreign[:5])}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
