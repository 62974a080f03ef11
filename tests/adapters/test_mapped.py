"""What becomes of the memory of a mapped file."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from loraspan import _core
from loraspan.adapters import mapped
from loraspan.errors import FormatError

MAPS = Path("/proc/self/maps")
needs_maps = pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what is mapped")
# a thread of the core's gives them up: as many entries as make them worth one
LARGE = 1 << 19


def written(folder, entries):
    path = folder / "x.safetensors"
    safetensors.torch.save_file({"a": torch.arange(entries, dtype=torch.float32), "b": torch.ones(3)}, path)
    return str(path)


def is_mapped(path):
    return path in MAPS.read_text()


def goes(path, seconds=20.0):
    end = time.monotonic() + seconds
    while is_mapped(path) and time.monotonic() < end:
        time.sleep(0.001)
    return not is_mapped(path)


@needs_maps
def test_a_small_file_goes_with_its_last_view(tmp_path):
    path = written(tmp_path, 8)
    file = mapped.map_tensors(path)
    view = file.tensors["a"][2:4]
    del file
    assert is_mapped(path)
    assert view.tolist() == [2.0, 3.0]
    del view
    assert not is_mapped(path)


@needs_maps
def test_a_large_file_goes_soon_after_its_last_view(tmp_path):
    path = written(tmp_path, LARGE)
    for _ in range(20):
        file = mapped.map_tensors(path)
        view = file.tensors["a"][-2:]
        del file
        assert is_mapped(path)
        assert view.tolist() == [LARGE - 2, LARGE - 1]
        del view
    assert goes(path)


@needs_maps
def test_many_large_files_all_go(tmp_path):
    paths = []
    for i in range(30):
        (tmp_path / str(i)).mkdir()
        paths.append(written(tmp_path / str(i), LARGE))
    files = [mapped.map_tensors(path) for path in paths]
    assert all(file.tensors["a"].sum() > 0 for file in files)
    del files
    assert all(goes(path) for path in paths)


@needs_maps
def test_a_forked_process_gives_up_its_files_too(tmp_path):
    path = written(tmp_path, LARGE)
    # forked while a thread of the parent is giving up files: what that was at is the child's too
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from loraspan.adapters.mapped import map_tensors
from test_mapped import goes
children = []
for _ in range(20):
    kept = [map_tensors({path!r}) for _ in range(20)]
    touched = [file.tensors["a"].sum().item() for file in kept]
    del kept
    child = os.fork()
    if not child:
        file = map_tensors({path!r})
        right = file.tensors["a"][-1].item() == {LARGE - 1}
        del file
        os._exit(0 if right and goes({path!r}) else 1)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children) or not goes({path!r}))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=300, check=False)
    assert done.returncode == 0


def test_a_process_ends_while_files_are_given_up(tmp_path):
    path = written(tmp_path, LARGE)
    script = f"from loraspan.adapters.mapped import map_tensors\nx = [map_tensors({path!r}) for _ in range(200)]\ndel x"
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_writing_to_a_view_leaves_the_file(tmp_path):
    path = written(tmp_path, 8)
    before = Path(path).read_bytes()
    mapped.map_tensors(path).tensors["a"].fill_(7)
    assert Path(path).read_bytes() == before


def test_what_cannot_be_mapped_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        _core.Mapping(-1, 16)
    assert caught.value.errno == errno.EBADF

    def no_room(_descriptor, _size):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mapped, "map_file", no_room)
    path = written(tmp_path, 8)
    with pytest.raises(FormatError, match="cannot be mapped: Cannot allocate memory") as caught:
        mapped.map_tensors(path)
    assert path in str(caught.value)
