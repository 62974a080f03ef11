"""The part of the operators' tests that every run affords on Triton's interpreter; `.ci/kernels` runs all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

TESTS = Path(__file__).parents[1] / "ops"
# by file: a test of each operator that meets tiles' edges, several dtypes, and the float64 mode
CHOSEN = {
    "test_gram.py": "past-a-tile-f16 or past-a-tile-f32 or ragged-mixed",
    "test_combine.py": "float64 and past-a-tile and bfloat16",
    "test_sketch.py": "float64 and (past-a-tile-f16 or ragged-mixed)",
    "test_reconstruct.py": "float64 and past-a-tile or pieces_fill",
    "test_shared_lora.py": "each_form_alone or beside_y or mixes_tasks and float16-2",
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process that interprets")
@pytest.mark.parametrize("name", CHOSEN)
def test_an_operator_by_its_interpreted_kernels(name):
    command = [sys.executable, "-m", "pytest", TESTS / name, "-q", "-k", f"triton and ({CHOSEN[name]})"]
    settings = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # all could be skipped in silence otherwise
    assert " skipped" not in done.stdout.splitlines()[-1]
