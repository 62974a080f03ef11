"""Feed hostile files to every reader, and count what becomes of them: ``python -m tests.fuzz --cases 100000``.

First every case that is kept in ``corpus/`` is run again; then new ones, by atheris where it is installed (the extra
``fuzz``), which looks at what a case reached before it makes the next, and otherwise by hypothesis alone. A report is
printed as JSON, by target and outcome. It ends with 1 if anything but errors of ``loraspan.errors`` came out, and with
the failing cases in ``--failures``: move one to ``corpus/`` to have it run from then on.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
# cases of one process: what a target may leave behind in memory does not pile up
BATCH = 5000


def main():
    """Run the asked number of cases, each batch in a process of its own."""
    asked = _asked()
    sys.path.insert(0, str(HERE.parent))
    from fuzz.targets import TARGETS

    chosen = {name: share for name, (*_, share) in TARGETS.items() if name in (asked.target or TARGETS)}
    total, outcomes = sum(chosen.values()), {}
    plan = {name: -(-asked.cases * share // total) for name, share in chosen.items()}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=_memory()) as scratch:
        kept = sorted(asked.corpus.glob("*.json"))
        if kept:
            _replay(kept, Path(scratch), asked, outcomes)
        # atheris keeps one process to itself
        together = asked.engine == "hypothesis" and asked.cases <= BATCH
        for part in [plan] if together else [{name: count} for name, count in plan.items()]:
            _all(part, asked, Path(scratch), outcomes)
            _say(f"{part}: {time.monotonic() - begun:.0f} s")
    _report(outcomes, time.monotonic() - begun, asked)
    return int(any(_bad(outcome) for of_target in outcomes.values() for outcome in of_target))


def _all(plan, asked, scratch, outcomes):
    """Run a plan in batches of so many cases; a batch that dies goes on behind the case that it died of."""
    left, batch = dict(plan), 0
    while left:
        done = _batch({name: min(count, BATCH) for name, count in left.items()}, asked, batch, scratch, outcomes)
        left = {name: count - done.get(name, 0) for name, count in left.items() if count > done.get(name, 0)}
        batch += 1


def _batch(plan, asked, batch, scratch, outcomes):
    """Run a process until it has done its cases or one of them has ended it; give how many it did of each target."""
    folder = scratch / "work"
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    options = {
        "plan": json.dumps(plan),
        "engine": asked.engine,
        "seed": asked.seed * 1000 + batch,
        "folder": folder,
        "corpus": scratch / f"reached-{'-'.join(plan)}",
        "failures": asked.failures,
    }
    command = [sys.executable, str(HERE / "worker.py"), *(f"--{key}={value}" for key, value in options.items())]
    ended = _run(command)
    result = folder / "result.json"
    counted = json.loads(result.read_text())["outcomes"] if result.exists() else {}
    for name, outcome in counted.items():
        outcomes.setdefault(name, Counter()).update(outcome)
    done = {name: sum(outcome.values()) for name, outcome in counted.items()}
    if ended.returncode:
        target = (folder / "target").read_text() if (folder / "target").exists() else next(iter(plan))
        if not (folder / "running").exists():
            _say(ended.stderr[:2000])
            if not done:
                raise SystemExit(f"the fuzzer itself failed, with exit code {ended.returncode}")
            # between two cases, in what makes them: the rest is left to the next process
            asked.restarts += 1
            return done
        _keep_fatal(target, ended, folder, asked, outcomes)
        done[target] = done.get(target, 0) + 1
    return done


def _run(command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if not line.startswith(("INFO:", "WARNING:")))
    return done


def _keep_fatal(target, ended, folder, asked, outcomes):
    """Keep the case that a process died of, which still lies where it was laid out."""
    from fuzz.cases import found

    how = "hung" if "Timeout (" in ended.stderr else "died"
    _say(ended.stderr[:2000])
    outcomes.setdefault(target, Counter())[how] += 1
    asked.failures.mkdir(parents=True, exist_ok=True)
    number = len(list(asked.failures.glob(f"{target}-{how}-*.json")))
    (asked.failures / f"{target}-{how}-{number}.json").write_text(found(target, folder / "case").dump())


def _replay(kept, scratch, asked, outcomes):
    from fuzz.cases import load
    from fuzz.oracle import Judge
    from fuzz.targets import TARGETS

    judge = Judge(scratch, {name: run for name, (run, *_) in TARGETS.items()}, asked.failures)
    for path in kept:
        outcome = judge.run(load(path.read_text()))
        if _bad(outcome):
            _say(f"{path.name}: {outcome}")
    for name, counted in judge.outcomes.items():
        outcomes.setdefault(name, Counter()).update(counted)


def _report(outcomes, seconds, asked):
    cases = sum(sum(counted.values()) for counted in outcomes.values())
    failed = sum(n for counted in outcomes.values() for outcome, n in counted.items() if _bad(outcome))
    table = {name: dict(counted.most_common()) for name, counted in outcomes.items()}
    report = {"engine": asked.engine, "seed": asked.seed, "cases": cases, "failed": failed, "restarts": asked.restarts}
    print(json.dumps({**report, "seconds": round(seconds), "outcomes": table}, indent=2))  # noqa: T201 (what it is for)


def _bad(outcome):
    from fuzz.oracle import CLOSED

    return outcome != "ok" and outcome not in {kind.__name__ for kind in CLOSED}


def _say(text):
    print(text, file=sys.stderr, flush=True)  # noqa: T201 (progress)


def _memory():
    """A folder in memory, where there is one: cases are many and small."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else None


def _asked():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", help="one or several; all by default")
    parser.add_argument("--engine", choices=["atheris", "hypothesis"], default=_engine())
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus")
    return parser.parse_args(namespace=argparse.Namespace(restarts=0))


def _engine():
    return "atheris" if importlib.util.find_spec("atheris") else "hypothesis"


if __name__ == "__main__":
    sys.exit(main())
