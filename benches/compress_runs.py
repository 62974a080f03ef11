"""Start one contender of ``benches/compress.py`` in a process of its own, and watch it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
# exact versions: a figure is about these
PEER_PACKAGES = (["torch==2.13.0"], ["vlora-dev==1.0.0", "lorashare==0.1.3"])
SAMPLE_SECONDS = 0.005


class Failure(Exception):
    """A contender's process ended before its job."""


@dataclass(frozen=True)
class Contender:
    """Who runs.

    Attributes:
        name: in tables and on the command line.
        script: under ``peers``.
        rank: the number of components it is asked for.
        own: whether it runs in this interpreter's environment, and not in that of the peers.
        dtypes: of the collections that it is given.
        repeats: how often by default; the slow ones less.
    """

    name: str
    script: str
    rank: int
    own: bool
    dtypes: tuple[str, ...]
    repeats: int


ALL_DTYPES = ("f32", "f16", "bf16")
CONTENDERS = {
    one.name: one
    for one in (
        Contender("loraspan", "run_loraspan.py", 32, True, ALL_DTYPES, 5),
        Contender("torch mock", "torch_mock.py", 32, True, ALL_DTYPES, 5),
        # k = 16: its components are whole adapters, so 16 of them weigh eight times what 32 directions do
        Contender("vlora", "run_vlora.py", 16, False, ("f32",), 2),
        Contender("lorashare", "run_lorashare.py", 32, False, ("f32",), 1),
    )
}


def peers_python(venv: Path) -> str:
    """Give the interpreter of the peers' own virtual environment, made and filled if it is not there."""
    python, complete = venv / "bin" / "python", venv / "complete"
    if not complete.exists():
        print(f"compress: installing the peers into {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        for packages in PEER_PACKAGES:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        complete.write_text(json.dumps(PEER_PACKAGES))
    return str(python)


def warm(folders: list[Path]) -> int:
    """Read every file once, so that all of them lie in the page cache; give their bytes."""
    size = 0
    buffer = bytearray(1 << 22)
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while read := file.readinto(buffer):
                    size += read
    return size


def run_once(
    contender: Contender, python: str, collection: Path, adapters: int, threads: int, out: Path, *, inside: bool = False
) -> dict[str, Any]:
    """Run the whole job once in a new process.

    Returns:
        Seconds in all and by stage, seconds of processor time, the peak of anonymous memory above that after the
        import, the bytes on disk, and the version of torch.
    """
    shutil.rmtree(out, ignore_errors=True)
    command = _command(contender, python, collection, adapters, threads, out) + (["--inside"] if inside else [])
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment(threads))
    events, peak = _watch(child)
    if child.returncode or "done" not in events:
        raise Failure(f"{contender.name} failed with status {child.returncode}; its message is above")
    ready, done = events["ready"], events["done"]
    return {
        "total": done["total"],
        "stages": done["stages"],
        "processor": done["processor"],
        "memory": max(peak - ready["anonymous"], 0),
        "disk": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "torch": ready["torch"],
    }


def measure(
    contender: Contender, python: str, collection: Path, adapters: int, threads: int, out: Path
) -> dict[str, float]:
    """Give the errors on ``dW`` of what the last run saved, in a process of its own."""
    command = [*_command(contender, python, collection, adapters, threads, out), "--measure"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, env=_environment(threads), check=True, text=True).stdout
    return {key: value for key, value in json.loads(answer.splitlines()[-1]).items() if key != "event"}


def _command(contender: Contender, python: str, collection: Path, adapters: int, threads: int, out: Path) -> list[str]:
    options = {"--adapters": adapters, "--rank": contender.rank, "--threads": threads}
    script = PEERS / contender.script
    return [python, str(script), str(collection), str(out), *(str(x) for pair in options.items() for x in pair)]


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def _watch(child: subprocess.Popen[bytes]) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the child's events until it ends, sampling its anonymous memory between "ready" and "done"."""
    events: dict[str, dict[str, Any]] = {}
    peak = 0
    # kept open: to look is to take a processor from the child
    status = os.open(f"/proc/{child.pid}/status", os.O_RDONLY)
    assert child.stdout is not None
    while True:
        readable, _, _ = select.select([child.stdout], [], [], SAMPLE_SECONDS)
        if readable:
            line = child.stdout.readline()
            if not line:
                break
            with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
                event = json.loads(line)
                events[event["event"]] = event
        if "ready" in events and "done" not in events:
            peak = max(peak, _anonymous(status))
    os.close(status)
    child.wait()
    return events, peak


def _anonymous(status: int) -> int:
    with contextlib.suppress(OSError):
        _, found, after = os.pread(status, 1 << 16, 0).partition(b"RssAnon:")
        return 1024 * int(after.split(maxsplit=1)[0]) if found else 0
    return 0
