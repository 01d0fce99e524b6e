"""How long the definitions take to load, against `import dagster` alone: `python -m benchmarks.startup`."""

import subprocess
import sys
import time

from benchmarks.harness import arguments, interleaved, median, report


def loading(code: str) -> dict[str, float]:
    """Seconds of a fresh process that runs `code`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    args = arguments(__doc__).parse_args()
    sides = {name: f"import {name}" for name in ("dagster", "finetune_assets.definitions")}
    runs = interleaved({name: lambda code=code: loading(code) for name, code in sides.items()}, 3 if args.quick else 5)
    seconds = {name: median(measured, "seconds") for name, measured in runs.items()}
    ratio = seconds["finetune_assets.definitions"] / seconds["dagster"]
    rows = [(f"import {name}", f"{value:.2f} s") for name, value in seconds.items()]
    report("Start-up, median of fresh processes", rows, {"definitions_vs_import_dagster": ratio}, args.json)


if __name__ == "__main__":
    main()
