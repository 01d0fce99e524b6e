"""How soon processes are ready, against a bare import: `python -m benchmarks.startup`.

CPU time of a process and its children. A worker, until its trainer is imported, as a fresh interpreter and forked from
a fork server; `finetune plan demo`, on an empty cache and again; the definitions; and a shortened `finetune run demo`
whose artifacts the store has.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import ROOT, arguments, interleaved, median, report
from finetune_assets.worker import warm
from finetune_assets.worker.process import FORKSERVER

AS_A_WORKER = """
from finetune_assets.worker.process import run_worker
run_worker("benchmarks.worker_ready")
"""
SHORT = ("training.max_steps=2", "evaluation.generated_rows=4", "evaluation.general_tokens=500")


def cpu_time(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds that a fresh interpreter and its children compute."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, check=True, **quiet, env={**os.environ, **(environment or {})})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def forked() -> dict[str, float]:
    """Seconds that a worker computes which this process's fork server forks."""
    environment = {**os.environ, FORKSERVER: warm.own().address}
    process = warm.ForkedProcess(warm.own().address, "benchmarks.worker_ready", [], environment, subprocess.PIPE)
    assert process.stderr
    seconds = float(process.stderr.read())
    assert process.wait() == 0
    return {"seconds": seconds}


def main() -> None:
    args = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        cache = folder / "cache"
        settings = {
            "FINETUNE_CONFIGS": str(folder / "configs"),
            "FINETUNE_CACHE": str(cache),
            "FINETUNE_STORE": f"file://{folder}/store",
            "DAGSTER_HOME": str(folder),
            "FINETUNE_RAW_DATA": "sample",
            "HF_HUB_OFFLINE": "1",
        }

        def plan(first: bool) -> dict[str, float]:
            if first:
                shutil.rmtree(cache, ignore_errors=True)
            return cpu_time("-m", "finetune_assets.cli", "plan", "demo", environment=settings)

        def run() -> dict[str, float]:
            overrides = [part for setting in SHORT for part in ("--set", setting)]
            own = {**settings, "FINETUNE_CACHE": str(folder / "cache of runs")}
            return cpu_time("-m", "finetune_assets.cli", "run", "demo", *overrides, environment=own)

        run()
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "import torch": lambda: cpu_time("-c", "import torch"),
            "worker, until its trainer is imported": lambda: cpu_time("-c", AS_A_WORKER),
            "forked worker, until its trainer is imported": forked,
            "finetune plan demo, first": lambda: plan(first=True),
            "finetune plan demo, repeated": lambda: plan(first=False),
            "import dagster": lambda: cpu_time("-c", "import dagster"),
            "import finetune_assets.definitions": lambda: cpu_time("-c", "import finetune_assets.definitions"),
            "finetune run demo, all cache hits": run,
        }
        runs = interleaved(sides, 3 if args.quick else 5)
    seconds = {name: median(measured, "seconds") for name, measured in runs.items()}
    torch, worker, from_server, first, repeated, dagster, definitions, cached = seconds.values()
    ratios = {
        "worker_vs_import_torch": worker / torch,
        "forked_worker_vs_import_torch": from_server / torch,
        "cli_vs_import_torch": repeated / torch,
        "cli_first_vs_import_torch": first / torch,
        "definitions_vs_import_dagster": definitions / dagster,
        "cached_run_vs_import_dagster": cached / dagster,
    }
    rows = [(name, f"{value:.2f} s") for name, value in seconds.items()]
    report("Start-up: CPU time, median of fresh processes", rows, ratios, args.json)


if __name__ == "__main__":
    main()
