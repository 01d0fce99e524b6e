"""How long new data waits to be trained on, and what a thousand experiments cost: `python -m benchmarks.automation`.

A real daemon at the local settings (`.dagster_home/dagster.yaml`). Files are dropped into its folder, one after the
other; from Dagster's own records, the time from each drop to the first training step is split into waiting for ticks
and queues, and work. Then a thousand subscribed experiments want to be trained at once, and their runs are counted
until all stand in the queue.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

from benchmarks.harness import ROOT, arguments, interleaved, median, report
from benchmarks.startup import loading

ROWS = ROOT / "finetune_assets" / "sample" / "dolly_sample.jsonl"
EXPERIMENT = """
subscribed: true
model: {base_model: demo-base, dtype: float32}
data: {tokenization: {cutoff_len: 192}}
training: {max_steps: 1, micro_batch_size: 8, macro_batch_size: 8, precision: fp32, logging_steps: 1, seed: %d}
evaluation: {generated_rows: 2, max_new_tokens: 2}
"""
PARTS = {
    "wait: until a tick has seen it, and one finds it still": ("dropped", "raw asked for"),
    "wait: in the queue, to be read": ("raw asked for", "raw launched"),
    "work: process, dolly_raw, its checks": ("raw launched", "raw made"),
    "wait: until the experiments are looked at": ("raw made", "training asked for"),
    "wait: in the queue, to be trained on": ("training asked for", "training launched"),
    "work: process, tokenized_dataset, torchrun": ("training launched", "first step"),
}
ADAPTER, SUCCESS = dg.AssetKey("lora_adapter"), dg.DagsterRunStatus.SUCCESS
STARTING = dg.DagsterEventType.RUN_STARTING
T = TypeVar("T")


class Deployment:
    """A project of its own, with an inbox and so many subscribed experiments, and its daemon."""

    def __init__(self, folder: Path, experiments: int) -> None:
        self.folder, self.inbox, home = folder, folder / "inbox", folder / "home"
        (folder / "configs" / "experiments").mkdir(parents=True)
        self.inbox.mkdir()
        home.mkdir()
        for name in ("base.yaml", "raw_data.yaml"):
            shutil.copy(ROOT / "configs" / name, folder / "configs")
        shutil.copy(ROOT / ".dagster_home" / "dagster.yaml", home)
        for number in range(experiments):
            path = folder / "configs" / "experiments" / f"e{number:04}.yaml"
            path.write_text(EXPERIMENT % number, encoding="utf-8")
        self.environment = os.environ | {
            "FINETUNE_CONFIGS": str(folder / "configs"),
            "FINETUNE_RAW_DATA": str(self.inbox),
            "FINETUNE_NAMESPACE": "benchmark",
            "DAGSTER_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.instance = dg.DagsterInstance.from_config(str(home))

    @contextmanager
    def daemon(self) -> Iterator[None]:
        program = Path(sys.executable).with_name("dagster-daemon")
        with (self.folder / "daemon.log").open("wb") as log:
            process = subprocess.Popen(
                [program, "run", "-m", "finetune_assets.definitions"],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.wait_for(lambda: "Instance is configured" in (self.folder / "daemon.log").read_text())
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)])

    def wait_for(self, find: Callable[[], T], seconds: float = 900) -> T:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := find():
                return found
            time.sleep(0.2)
        raise TimeoutError((self.folder / "daemon.log").read_text()[-3000:])

    def raw_runs(self) -> list[Any]:
        """Those that the sensor started, newest first."""
        records = self.instance.get_run_records()
        return [record for record in records if "finetune/raw_version" in record.dagster_run.tags]

    def asked(self) -> list[Any]:
        """Runs that were asked for to train, newest first."""
        records = self.instance.get_run_records()
        return [record for record in records if ADAPTER in (record.dagster_run.asset_selection or ())]

    def trained(self) -> list[Any]:
        """Those of them that have."""
        return [record for record in self.asked() if record.dagster_run.status is SUCCESS]

    def when(self, record: Any, kind: dg.DagsterEventType | None, text: str = "") -> float:
        """When the log of a run says something first."""
        log = self.instance.all_logs(record.dagster_run.run_id, of_type=kind)
        return next(entry.timestamp for entry in log if text in (entry.user_message or ""))


def drop(deployment: Deployment, number: int, lines: list[str]) -> dict[str, float]:
    """Drop a file, wait for all that follows, and tell when (seconds since 1970) what was reached."""
    raw_before, before = len(deployment.raw_runs()), len(deployment.trained())
    dropped = time.time()
    (deployment.inbox / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    training = deployment.wait_for(lambda: deployment.trained()[: -before or None])[0]
    raw = deployment.raw_runs()[-1 - raw_before]
    return {
        "dropped": dropped,
        "raw asked for": raw.create_timestamp.timestamp(),
        "raw launched": deployment.when(raw, STARTING),
        "raw made": raw.end_time,
        "training asked for": training.create_timestamp.timestamp(),
        "training launched": deployment.when(training, STARTING),
        "first step": deployment.when(training, None, "step 1/"),
    }


def drops(count: int) -> list[dict[str, float]]:
    """Seconds of each of PARTS, for each drop."""
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder), 1)
        with deployment.daemon():
            for number in range(count + 1):
                when = drop(deployment, number, lines[number * 40 : number * 40 + 40] if number else lines[400:])
                found.append({part: when[end] - when[begin] for part, (begin, end) in PARTS.items()})
    return found[1:]  # the first brings the base model, once for ever


def launching(count: int) -> float:
    """Seconds from the raw data's arrival in the store until all experiments' runs are launched or queued."""
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder), count)
        (deployment.folder / "configs" / "experiments" / "broken.yaml").write_text("subscribed: true\nmodel: [")
        with deployment.daemon():
            shutil.copy(ROWS, deployment.inbox)
            deployment.wait_for(lambda: len(deployment.asked()) >= count, 3600)
            (raw,) = deployment.raw_runs()
            return deployment.asked()[0].create_timestamp.timestamp() - raw.end_time


def definitions(count: int) -> dict[str, float]:
    """Seconds that the definitions of so many experiments take to load."""
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder), count)
        os.environ["FINETUNE_CONFIGS"] = deployment.environment["FINETUNE_CONFIGS"]
        return loading("import finetune_assets.definitions")


def measure_definitions(many: int, rows: list[tuple[str, str]]) -> float:
    loads = interleaved({str(n): lambda n=n: definitions(n) for n in (1, many)}, 3)
    one, all_of_them = (median(loads[str(n)], "seconds") for n in (1, many))
    rows += [(f"definitions of {n} experiments", f"{s:.2f} s") for n, s in ((1, one), (many, all_of_them))]
    return all_of_them - one


def measure_drops(times: int, rows: list[tuple[str, str]]) -> float:
    measured = drops(times)
    rows += [(f"{part}, median of {times} drops", f"{median(measured, part):.1f} s") for part in PARTS]
    waits = [sum(seconds for part, seconds in one.items() if part.startswith("wait")) for one in measured]
    rows += [("all waiting of a drop, longest", f"{max(waits):.1f} s")]
    return statistics.median(waits)


def measure_launching(many: int, rows: list[tuple[str, str]]) -> float:
    seconds = launching(many)
    rows += [(f"runs of {many} experiments asked for, beside trainings", f"{seconds:.0f} s")]
    return seconds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=["definitions", "drops", "launching"], help="one of the three alone")
    args = parser.parse_args()
    many, times = (50, 3) if args.quick else (1000, 10)
    rows: list[tuple[str, str]] = []
    ratios = {}
    if args.only in (None, "definitions"):
        ratios["definitions_more_s"] = measure_definitions(many, rows)
    if args.only in (None, "drops"):
        ratios["drop_wait_s"] = measure_drops(times, rows)
    if args.only in (None, "launching"):
        ratios["launch_s"] = measure_launching(many, rows)
    report("New data, and many experiments", rows, ratios, args.json)


if __name__ == "__main__":
    main()
