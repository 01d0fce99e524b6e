"""What the benchmarks share: their command line, and runs in processes of their own."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Runs = dict[str, list[dict[str, float]]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs, less data: shows that it works")
    parser.add_argument("--json", action="store_true", help="print the ratios as one JSON object on the last line")
    return parser


def interleaved(sides: Mapping[str, Callable[[], dict[str, Any]]], runs: int) -> Runs:
    """Run the sides in turn, `runs` times each, with a line on stderr for each run."""
    measured: Runs = {name: [] for name in sides}
    for run in range(runs):
        for name, side in sides.items():
            began = time.monotonic()
            measured[name].append(side())
            print(f"run {run + 1} of {runs}: {name}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return measured


def median(runs: list[dict[str, float]], figure: str) -> float:
    return statistics.median(run[figure] for run in runs)


def in_process(module: str, *args: str) -> dict[str, Any]:
    """Run a module in a process of its own; the JSON object on its last line."""
    command = [sys.executable, "-m", module, *args]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def report(title: str, rows: list[tuple[str, str]], ratios: dict[str, float], as_json: bool) -> None:
    """Print figures and ratios."""
    print(title)
    for name, value in [*rows, *((name, f"{ratio:.3f}") for name, ratio in ratios.items())]:
        print(f"  {name:<40} {value}")
    if as_json:
        print(json.dumps(ratios))
