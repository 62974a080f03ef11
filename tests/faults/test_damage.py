"""Files of a store that were torn, zeroed or changed in one bit after they were written."""

import hashlib

import pytest

from faults.commands import digest, named, opened, team
from loraspan import store
from loraspan.errors import LoraspanError

KINDS = {"CURRENT": "CURRENT", "manifest": "manifest-*", "basis": "basis-*", "tasks": "tasks-*"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of several segments, with a renamed and a removed task, and what it holds."""
    folder = tmp_path_factory.mktemp("team")
    team(folder)
    opened(folder).add(named("new", path="layers.1.q"), max_error=0.3)
    opened(folder).rename("sql", "../sql")
    opened(folder).remove("legal")
    path = folder / "team.span"
    assert store.verify(path) == []
    return path, digest(store.open(path))


def parts(path, kind):
    """The files of that kind that the current generation consists of."""
    current = int((path / "CURRENT").read_text())
    names = {data.file for data in store.open_at(path).segments} | {f"manifest-{current:06d}.json", "CURRENT"}
    files = sorted(path.glob(KINDS[kind]))
    return [file for file in files if file.name in names or kind == "basis"]


def regions(file, kind):
    """First and last bytes of each class of positions in a file."""
    size = file.stat().st_size
    if kind in ("CURRENT", "manifest"):
        return {"all": (0, size)}
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return {"length": (0, 8), "header": (8, start), "data": (start, size)}


def seen(path):
    """What opening gives: a checksum of everything, or the error."""
    try:
        return digest(store.open(path))
    except LoraspanError as error:
        return error


def found(path):
    """Whether verify finds anything, as a finding or an error of its own."""
    try:
        return bool(store.verify(path))
    except LoraspanError:
        return True


def spoil(file, content, judge):
    """Judge with other content in a file, and put the file back."""
    honest = file.read_bytes()
    assert content != honest
    file.write_bytes(content)
    try:
        return judge()
    finally:
        file.write_bytes(honest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit(whole, kind):
    """Verify finds it wherever it is, as opening with a check does, and opening wherever it is read."""
    path, saved = whole
    cases, noticed = 0, 0
    for file in parts(path, kind):
        honest = file.read_bytes()
        for region, (first, last) in regions(file, kind).items():
            # each bit of a short region, and of a long one some bytes all over it, bits taking turns
            step = max(1, (last - first) // 40)
            for at in range(first, last, step):
                content = bytearray(honest)
                content[at] ^= 1 << (at // step % 8)
                cases += 1
                assert spoil(file, content, lambda: found(path)), (file.name, region, at)
                got = spoil(file, content, lambda: seen(path))
                noticed += isinstance(got, LoraspanError)
                if kind in ("basis", "tasks"):
                    with pytest.raises(LoraspanError, match=file.name):
                        spoil(file, content, lambda: store.open(path, check=True))
                if kind in ("CURRENT", "manifest"):
                    # a line feed more or less does not matter, nor does another generation: both are whole
                    assert isinstance(got, LoraspanError) or kind == "CURRENT", (file.name, at)
    print(kind, cases, "flipped bits, found by verify;", noticed, "by opening")  # noqa: T201
    assert cases >= (2 if kind == "CURRENT" else 40)
    assert noticed >= (1 if kind == "CURRENT" else 30)
    assert seen(path) == saved == digest(store.open(path, check=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeroed", [False, True], ids=["torn", "zeroed"])
def test_a_tail_that_is_lost(whole, kind, zeroed):
    """A disk that lost its last pages gives a file that is short, or whose end is zeros."""
    path, saved = whole
    cases = 0
    for file in parts(path, kind):
        honest = file.read_bytes()
        for lost in sorted({1, 2, 8, 64, 512, 4096, len(honest) // 2, len(honest)}):
            kept = honest[: max(0, len(honest) - lost)]
            content = kept + bytes(len(honest) - len(kept)) * zeroed
            if content == honest:
                continue
            cases += 1
            got = spoil(file, content, lambda: seen(path))
            # the line feed at the end of a text may go
            if kind in ("CURRENT", "manifest") and lost == 1 and not zeroed:
                assert got == saved
                continue
            assert spoil(file, content, lambda: found(path)), (file.name, lost)
            # zeros within the data are values like others until they are compared with their checksum
            assert isinstance(got, LoraspanError) or (zeroed and kind in ("basis", "tasks")), (file.name, lost)
    assert cases >= 3
    assert seen(path) == saved


def test_files_that_change_places(whole):
    """Each under the name of the other: the names are those of their contents."""
    path, saved = whole
    basis, tasks = parts(path, "basis")[0], parts(path, "tasks")[0]
    contents = {file: file.read_bytes() for file in (basis, tasks)}
    basis.write_bytes(contents[tasks])
    tasks.write_bytes(contents[basis])

    assert isinstance(seen(path), LoraspanError)
    assert found(path)
    for file, content in contents.items():
        file.write_bytes(content)
        assert hashlib.sha256(content).hexdigest()[:32] in file.name
    assert seen(path) == saved
