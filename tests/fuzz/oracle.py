"""One judge for all targets: only errors of the closed list, in time, in little memory, nothing written elsewhere."""

import faulthandler
import gc
import os
import resource
import sys
import traceback
from collections import Counter
from pathlib import Path

from loraspan import errors
from loraspan.errors import LoraspanError

SECONDS = 20
# resident memory that one case may add: many times what files of some kB need, a hundredth of what an absurd shape asks
MEMORY = 96 << 20
PER_BYTE = 64
# address space beyond what the process has when it starts: an allocation of this size fails rather than being made
ADDRESSES = 4 << 30
CLOSED = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraspanError)}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ONE = ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree")
_TWO = ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile")
# audit events that change names, by how many paths they give
_CHANGES = dict.fromkeys(_ONE, 1) | dict.fromkeys(_TWO, 2)
_RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class"}


class Escaped(BaseException):
    """Something was to be written outside the folder, or run."""


class Guard:
    """Watch what the process opens to write, renames, removes and runs: an audit hook, which stays for its life."""

    def __init__(self):
        self._inside = None
        sys.addaudithook(self._saw)

    def __call__(self, folder):
        self._inside = os.path.realpath(folder) + os.sep
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._inside = None

    def _saw(self, event, args):
        if self._inside is None:
            return
        if event == "open":
            path, mode, flags = args
            # a descriptor was opened before, by its path
            paths = [path] if not isinstance(path, int) and (flags & _WRITES or set(mode or "") & set("wax+")) else []
        elif event in _RUNS:
            raise Escaped(f"{event} {args}")
        else:
            paths = args[: _CHANGES.get(event, 0)]
        for path in paths:
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(self._inside) and real != os.devnull:
                raise Escaped(f"{event} {real[:300]}")


class Judge:
    """Run cases, count what becomes of them by target and outcome, and keep the first few of each failure.

    Args:
        folder: to lay cases out in; the one that is running lies in ``folder/case``.
        failures: where failing cases are kept; None keeps none.
    """

    def __init__(self, folder, targets, failures=None, keep=2):
        self.outcomes, self.failures = {}, {}
        self._case, self._targets, self._kept, self._keep = Path(folder) / "case", targets, failures, keep
        self._guard, self._hurt = Guard(), Counter()
        # there while a target is at work: who dies then died of its case
        self.running = Path(folder) / "running"
        self.running.unlink(missing_ok=True)

    def run(self, case):
        """Run one case and give its outcome: ``ok``, the name of an error of the closed list, or what went wrong."""
        case.write(self._case)
        outcome = self._outcome(case)
        self.count(case, outcome)
        return outcome

    def count(self, case, outcome):
        """Count an outcome, and keep the case if it is a failure."""
        of_target = self.outcomes.setdefault(case.target, Counter())
        of_target[outcome] += 1
        if outcome == "ok" or any(outcome == kind.__name__ for kind in CLOSED):
            return
        self._hurt[case.target, outcome] += 1
        if self._kept and self._hurt[case.target, outcome] <= self._keep:
            self._kept.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in f"{case.target} {outcome}")[:100]
            (self._kept / f"{name}-{self._hurt[case.target, outcome]}.json").write_text(case.dump())

    def _outcome(self, case):
        # hypothesis measures collections from inside them: at the edge of the stack that ends the process
        callbacks, gc.callbacks[:] = gc.callbacks[:], []
        before = _resident()
        Path("/proc/self/clear_refs").write_text("5")
        self.running.touch()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            with self._guard(self._case):
                self._targets[case.target](self._case)
            outcome = "ok"
        except LoraspanError as error:
            kind = next(kind for kind in type(error).__mro__ if kind in CLOSED)
            outcome = kind.__name__ if str(error) else f"{kind.__name__} says nothing"
        except (Exception, Escaped) as error:
            outcome = _where(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
            gc.callbacks[:] = callbacks
            self.running.unlink()
        grown = _peak() - before
        if grown > MEMORY + PER_BYTE * case.size:
            outcome = f"memory: {case.size} bytes of files took {grown >> 20} MiB, then {outcome}"
        return outcome


def limit_addresses():
    """Let an allocation of some GiB fail at once, whatever the machine has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or size + ADDRESSES < hard:
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, hard))


def _where(error):
    """Name an error by its type and the innermost place in loraspan: one signature for one defect."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}loraspan{os.sep}" in f.filename]
    at = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    place = at.filename.rpartition(f"loraspan{os.sep}")[2]
    said = f" {error}"[:200] if isinstance(error, (Escaped, MemoryError, AssertionError)) else ""
    return f"{type(error).__name__} in {place}:{at.lineno} {at.name}{said}"


def _resident():
    return _status("VmRSS:")


def _peak():
    return _status("VmHWM:")


def _status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise AssertionError(key)
