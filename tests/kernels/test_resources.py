"""Every kernel builds for GPUs that are not here, spills nothing and loads wide; the table in the README is current."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(rows, printed table) of `python -m benchmarks.resources`, in a process that does not interpret kernels."""
    file = tmp_path_factory.mktemp("resources") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "benchmarks.resources", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text()), done.stdout.strip()


def test_every_kernel_builds_and_spills_nothing(report):
    rows, _ = report
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert len(rows) >= 40
    for row in rows:
        assert row["spills"] == 0, row
        assert row["stack"] == 0, row


def test_the_row_kernels_load_and_store_16_bytes_at_a_time(report):
    rows, _ = report
    seen = 0
    for row in rows:
        if row["name"].startswith(("measure", "differentiate")):
            seen += 1
            per_block = 1 if "256" in row["name"] else 4 if "fp32" in row["name"] else 2
            assert row["loads"]["128"] >= per_block, row
            if not row["name"].startswith("measure "):
                assert row["stores"]["128"] == per_block, row
    assert seen == 36


def test_the_table_in_the_readme_is_what_the_command_prints(report):
    import triton

    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    kept = text.split("<!-- resources -->")[1].split("<!-- end of resources -->")[0].strip()
    if f"(Triton {triton.__version__};" not in kept:
        pytest.skip("the table was made with another version of Triton")
    assert kept == report[1]
