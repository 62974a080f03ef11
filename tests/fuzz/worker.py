"""Feed targets until a number of cases has run: by hypothesis alone, or by it under atheris."""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

# random inputs that atheris starts from, and how many bytes an input has
SEEDS, LONGEST = 16, 4096


def main():
    """Run in a process of its own, which a case may kill: see ``__main__``."""
    asked = _asked()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if asked.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["loraspan"]):
            import loraspan.cli  # noqa: F401
    import torch

    from fuzz.oracle import Judge
    from fuzz.targets import TARGETS

    torch.set_num_threads(1)
    judge = Judge(asked.folder, {name: run for name, (run, *_) in TARGETS.items()}, asked.failures)
    begun = time.monotonic()

    def report():
        result = {"outcomes": judge.outcomes, "seconds": time.monotonic() - begun}
        (asked.folder / "result.json").write_text(json.dumps(result))

    for target, count in asked.plan.items():
        (asked.folder / "target").write_text(target)
        feed = _guided if asked.engine == "atheris" else _random
        feed(_counted(judge, count, report, stop=asked.engine == "atheris"), TARGETS[target][1], count, asked)
        report()


def _counted(judge, count, report, *, stop):
    """Give what is fed with cases: it judges ``count`` of them, and then ends the process or passes the rest over."""
    from fuzz.oracle import limit_addresses

    done = 0

    def one(case):
        nonlocal done
        if done == 1:
            limit_addresses()
        if done < count:
            judge.run(case)
            done += 1
        if done % 200 == 0 or done >= count:
            report()
        if done >= count and stop:
            # libFuzzer knows no other way to stop at a count
            os._exit(0)

    return one


def _random(one, cases, count, asked):
    from hypothesis import HealthCheck, Phase, given, seed, settings

    plain = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    options = settings(max_examples=count, phases=[Phase.generate], **plain)
    seed(asked.seed)(options(given(cases)(one)))()


def _guided(one, cases, _, asked):
    import atheris
    from hypothesis import HealthCheck, given, settings

    options = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    fed = options(given(cases)(one)).hypothesis.fuzz_one_input
    asked.corpus.mkdir(parents=True, exist_ok=True)
    # an input too short for a whole case is none, and libFuzzer would begin with those
    rng = random.Random(asked.seed)
    for i in range(SEEDS):
        (asked.corpus / f"{asked.seed}-{i}").write_bytes(rng.randbytes(LONGEST))
    flags = ["-rss_limit_mb=0", "-timeout=600", f"-seed={asked.seed + 1}", f"-max_len={LONGEST}", "-len_control=0"]
    atheris.Setup([sys.argv[0], *flags, "-verbosity=0", str(asked.corpus)], fed)
    atheris.Fuzz()


def _asked():
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=json.loads, required=True, help="numbers of cases by target; one for atheris")
    parser.add_argument("--engine", choices=["hypothesis", "atheris"], required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--failures", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
