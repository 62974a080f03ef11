"""A short run of the fuzzer, and proof that its judge sees each kind of failure."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fuzz import strategies
from fuzz.cases import Case, Special, found, load
from fuzz.oracle import CLOSED, Judge
from fuzz.targets import TARGETS
from loraspan.errors import FormatError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
ROOT = Path(__file__).parents[2]
CASES = 1200


def test_a_short_run(tmp_path):
    """Every target, in processes of their own; ``python -m tests.fuzz`` does a hundred thousand."""
    asked = ["--cases", str(CASES), "--engine", "hypothesis", "--failures", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *asked], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] == 0
    assert report["cases"] >= CASES
    assert report["outcomes"].keys() == TARGETS.keys()
    for name, counted in report["outcomes"].items():
        # some must get through, or the rest of a reader is never reached, and some must not
        assert counted.get("ok", 0) >= 2, (name, counted)
        assert name == "verify" or sum(counted.values()) > counted["ok"]


@pytest.mark.parametrize("kind", ["open", "verify"])
def test_stores_in_order_are_taken(tmp_path, kind):
    """Unspoilt, the material passes: what fails in a run is what was done to it."""
    for files in strategies.stores():
        Case(kind, {f"team.span/{name}": content for name, content in files.items()}).write(tmp_path / "case")
        TARGETS[kind][0](tmp_path / "case")


@pytest.mark.parametrize("kind", ["export", "live"])
def test_a_store_in_order_can_be_used(tmp_path, kind):
    files = strategies.stores()[-1]
    Case(kind, {f"team.span/{name}": content for name, content in files.items()}).write(tmp_path / "case")
    TARGETS[kind][0](tmp_path / "case")


@pytest.mark.parametrize("kind", ["adapter", "rewrite"])
def test_adapters_in_order_are_taken(tmp_path, kind):
    for files in strategies.adapters():
        Case(kind, {f"bad/{name}": content for name, content in files.items()}).write(tmp_path / "case")
        TARGETS[kind][0](tmp_path / "case")


def test_a_case_is_kept_as_it_is(tmp_path):
    files = {"a/text": b"{}\n", "a/bytes": b"\xff\0", "b": Special("folder"), "c": Special("link", "/none"), "d": b""}
    case = Case("open", files)
    case.write(tmp_path / "case")

    assert load(case.dump()) == case
    assert found("open", tmp_path / "case") == case
    assert case.size == 5


def fails(folder):
    raise KeyError(folder)


def writes_outside(folder):
    (folder.parent / "outside").write_text("x")


def renames_outside(folder):
    (folder / "a").rename(folder.parent / "outside")


def runs_a_program(_):
    subprocess.run(["true"], check=True)


def connects(_):
    with socket.socket() as line:
        line.connect(("127.0.0.1", 9))


def takes_memory(_):
    torch.ones(200 << 20, dtype=torch.uint8)


def refuses(_):
    raise FormatError("a: needs b; got c")


def refuses_silently(_):
    raise FormatError


def writes_inside(folder):
    (folder / "b").write_text("x")


JUDGED = {
    fails: "KeyError in ",
    writes_outside: "Escaped in ",
    renames_outside: "Escaped in ",
    runs_a_program: "Escaped in ",
    connects: "Escaped in ",
    takes_memory: "memory: 1 bytes of files took ",
    refuses_silently: "FormatError says nothing",
    refuses: "FormatError",
    writes_inside: "ok",
}


@pytest.mark.parametrize("target", JUDGED, ids=lambda target: target.__name__)
def test_the_judge_sees(tmp_path, target):
    judge = Judge(tmp_path, {"t": target}, tmp_path / "failures")

    outcome = judge.run(Case("t", {"a": b"x"}))

    assert outcome.startswith(JUDGED[target])
    assert not (tmp_path / "outside").exists()
    assert judge.outcomes == {"t": {outcome: 1}}
    kept = list((tmp_path / "failures").glob("*.json")) if (tmp_path / "failures").exists() else []
    assert len(kept) == (outcome not in {"ok", *(kind.__name__ for kind in CLOSED)})


HARMS = """
import os, sys, time
sys.path.insert(0, 'tests')
from pathlib import Path
from fuzz import oracle
from fuzz.cases import Case
import torch

oracle.SECONDS = 1
harms = {
    'hang': lambda _: time.sleep(60),
    'crash': lambda _: os.kill(os.getpid(), 11),
    'greed': lambda _: torch.empty(5 << 30, dtype=torch.uint8),
}
for name, harm in harms.items():
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    pid = os.fork()
    if not pid:
        oracle.limit_addresses()
        outcome = oracle.Judge(folder, {'t': harm}).run(Case('t', {'a': b'x'}))
        print(outcome, flush=True)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_hang_and_a_crash_end_the_process_and_leave_their_case(tmp_path):
    """The runner finds it where it was laid out. An absurd allocation fails rather than being made."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", HARMS, str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    said = done.stdout.splitlines()
    assert said[:2] == ["hang 1", "crash -11"], done.stdout + done.stderr
    assert said[2].startswith("RuntimeError in ")
    assert said[3] == "greed 0"
    assert "Timeout (" in done.stderr
    assert time.perf_counter() - begun < 50
    for harm in ("hang", "crash"):
        assert found("t", tmp_path / harm / "case") == Case("t", {"a": b"x"})
        assert (tmp_path / harm / "running").exists()
    assert not (tmp_path / "greed" / "running").exists()
