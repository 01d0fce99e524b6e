"""Rows by the ten thousand; by the million with `make soak`."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

COUNT = 1_000_000 if os.environ.get("SOAK") else 30_000


@pytest.mark.system
@pytest.mark.minutes
def test_many_rows_are_prepared_in_little_memory() -> None:
    """Raw rows to packed tokens in a process of its own, torch and transformers included."""
    command = [sys.executable, "-m", "benchmarks.scale", "--alone", "--rows", str(COUNT)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["rows"] == figures["examples"] == COUNT
    assert figures["peak_rss_mib"] <= 1_024
