"""Runs a command again and again in forked processes, each of which ends at another of its steps; talks JSON by lines.

A process of its own with one thread, since only such a process can be forked at any time; it has everything imported,
so that a case takes milliseconds.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from faults.commands import COMMANDS, another
from faults.steps import Steps
from loraspan.errors import LoraspanError

DONE, REFUSED, FAILED = 0, 3, 4
NOBODY = 65534
PATIENCE = 60
PAGE = 4096
# of each command and fault, how often all is looked at that the next writer has left
LOOKED_AT = 3
# cases that fail in one way or another are told in full up to so many
TOLD = 5


class Runner:
    """All cases of one command and one kind of fault, in one folder."""

    def __init__(self, command, root):
        self.command = COMMANDS[command]
        self.pristine, self.work = root / "pristine", root / "work"
        for folder in (self.pristine, self.work):
            shutil.rmtree(folder, ignore_errors=True)
        # the paths of sources are kept with their tasks: every case has to work at one and the same place
        self.work.mkdir()
        self.command.prepare(self.work)
        shutil.copytree(self.work, self.pristine, symlinks=True)
        self.old = self.command.look(self.work)
        status, told = self._child(lambda: self._count())
        assert status == DONE, told
        self.steps, uncounted = json.loads(told)
        assert not uncounted, f"files opened past the steps that are counted: {uncounted}"
        self.new = self.command.look(self.work)
        self.counts, self.failures, self._known = Counter(), [], {}

    def every_step(self, kind, stride=1):
        """One case for each step, or for some of them."""
        return self._steps(kind, range(0, len(self.steps), stride))

    def torn_writes(self):
        """One case for each write, which ends in its middle, and one behind the last step of all.

        The end of any other step is the beginning of the next.
        """
        writes = [i for i, step in enumerate(self.steps) if step == "write"]
        return self._steps("torn", [*writes, len(self.steps) - 1])

    def _steps(self, kind, stops):
        for stop in stops:
            self.case(f"{kind} at {stop} {self.steps[stop]}", lambda: Steps(kind, stop).install())  # noqa: B023 (called at once)
        return self.told()

    def file_sizes(self, sizes):
        """One case for each size that no file may pass: a disk that fills up in the middle of a write."""
        for size in sizes:
            self.case(f"files of {size} bytes", lambda: self._limit(size))  # noqa: B023 (called at once)
        return self.told()

    def read_only(self):
        """A folder that belongs to somebody else, and may be read."""
        self._reset()
        before = _state(self.work)
        status, said = self._child(lambda: self._harmed(self._become_nobody))
        self.counts["cases"] += 1
        if status != REFUSED or _state(self.work) != before:
            self._fail(f"in a folder to be read it ended with {status}, and changed it or not: {said}")
        self.counts["refused"] += status == REFUSED
        return self.told()

    def small_disks(self, largest=8):
        """Disks of so many pages beyond what is there, each of them real."""
        for pages in range(largest):
            self._reset()
            used = sum(-(-path.stat().st_size // PAGE) for path in self.work.rglob("*") if path.is_file())
            disk = ["mount", "-t", "tmpfs", "-o", f"size={max(1, used + pages) * PAGE}", "tmpfs", str(self.work)]
            shutil.rmtree(self.work)
            self.work.mkdir()
            subprocess.run(disk, check=True)
            try:
                shutil.copytree(self.pristine, self.work, symlinks=True, dirs_exist_ok=True)
                status, said = self._child(lambda: self.command.run(self.work) and None)
                self._judge_disk(pages, status, said)
            finally:
                subprocess.run(["umount", str(self.work)], check=True)
        return self.told()

    def _judge_disk(self, pages, status, said):
        self.counts["cases"] += 1
        seen = self.command.look(self.work)
        if (status, seen) not in {(DONE, self.new), (REFUSED, self.old)}:
            self._fail(f"a disk with {pages} pages: ended with {status}: {said}")
            return
        self.counts["done" if status == DONE else "refused"] += 1
        if status == REFUSED:
            self._check_refusal(f"a disk with {pages} pages", "old", said)

    def case(self, name, harm):
        """Run the command once with something wrong, and look at what it leaves."""
        self._reset()
        status, told = self._child(lambda: self._harmed(harm))
        how = {DONE: "done", REFUSED: "refused", -signal.SIGKILL: "killed"}.get(status)
        self.counts["cases"] += 1
        if how is None:
            self._fail(f"{name}: ended with {status}: {told}")
            return
        self.counts[how] += 1
        try:
            self._judge(name, how, told)
        except Exception:
            self._fail(f"{name}: {traceback.format_exc()}")

    def told(self):
        return {"steps": self.steps, "counts": self.counts, "failures": self.failures}

    def _judge(self, name, how, said):
        state = _state(self.work)
        # the same files give the same answers
        if (how, state) in self._known:
            self.counts[self._known[how, state]] += 1
            return
        seen = self.command.look(self.work)
        # what a command does need not be seen by a reader
        is_new = seen == self.new and (how == "done" or seen != self.old)
        word = "new" if is_new else "old" if seen == self.old else "neither the old nor the new"
        if word not in ("new", "old") or (how == "done" and not is_new):
            self._fail(f"{name}: {how}, and a reader sees {word}")
            return
        if how == "refused":
            self._check_refusal(name, word, said)
        self.command.follow(self.work)
        # what comes out is much the same every time
        if self.counts["distinct"] < LOOKED_AT:
            assert self.command.look(self.work) != "none", "nothing is there after the next writer"
        left = self.command.strangers(self.work)
        if left:
            self._fail(f"{name}: {how}, and the next writer leaves {left}")
        self._known[how, state] = word
        self.counts[word] += 1
        self.counts["distinct"] += 1

    def _check_refusal(self, name, word, said):
        """It says which of the two is there, and leaves nothing else."""
        honest = ("is the current one, and may not outlast", "what is done so far is kept")
        if word == "new" and not any(words in said for words in honest):
            self._fail(f"{name}: refused, and a reader sees the new, while the error says: {said}")
        left = self.command.strangers(self.work)
        if left and self.command.tidy:
            self._fail(f"{name}: refused, and it leaves {left}")

    def _fail(self, what):
        self.counts["failed"] += 1
        if len(self.failures) < TOLD:
            self.failures.append(what[-3000:])

    def _reset(self):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.pristine, self.work, symlinks=True)

    def _count(self):
        steps = Steps().install()
        self.command.run(self.work)
        return [steps.seen, steps.uncounted]

    def _harmed(self, harm):
        harm()
        self.command.run(self.work)

    def _limit(self, size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def _become_nobody(self):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    def _child(self, do):
        """Do it in a process of its own; give its exit status, and what it said."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            status, said = _ended(do)
            # the functions of os may count, or kill
            with open(writer, "wb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
                file.write(said.encode("utf-8", "replace")[-60_000:])
            os._exit(status)
        os.close(writer)
        with open(reader, "rb") as file:  # noqa: PTH123 (a descriptor)
            said = _read(file, pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def _ended(do):
    try:
        return DONE, json.dumps(do())
    except LoraspanError as error:
        return REFUSED, f"{type(error).__name__}: {error}"
    except BaseException:
        return FAILED, traceback.format_exc()


def _read(file, pid):
    os.set_blocking(file.fileno(), False)
    said, last = b"", time.monotonic() + PATIENCE
    while time.monotonic() < last:
        piece = file.read()
        if piece == b"":
            return said.decode("utf-8", "replace")
        said += piece or b""
        time.sleep(0.0005)
    os.kill(pid, signal.SIGABRT)
    return "it did not end"


def _state(folder):
    """All names and contents, apart from the random part of the names of drafts."""
    entries = []
    for path in sorted(folder.rglob("*")):
        random = ".tmp-" in path.name or path.name.endswith((".new", ".old"))
        name = "draft" if random else str(path.relative_to(folder))
        entries.append((name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None))
    return tuple(sorted(entries, key=str))


def main():
    torch.set_num_threads(1)
    for name, *inputs in (("legal",), ("sql", 7), ("new",)):
        another(name, *inputs)
    root = Path(sys.argv[1])
    root.mkdir(exist_ok=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begun = time.monotonic()
        try:
            runner = Runner(asked["command"], root)
            told = getattr(runner, asked["do"])(*asked.get("with", []))
        except Exception:
            told = {"steps": [], "counts": {}, "failures": [traceback.format_exc()]}
        told["seconds"] = round(time.monotonic() - begun, 1)
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
