"""Preparing rows to training-ready, against the per-example `datasets.map` recipe: `python -m benchmarks.data_prep`.

The recipe is the one that LoRA examples have used since Alpaca-LoRA: for each row, tokenize prompt and response, then
the prompt alone, and mask as many labels as that had tokens. Both sides begin from the same Parquet file and end with
ids and labels in Arrow on disk, with the same template, tokenizer and cut-off, one process, no helper threads.

The project's own preparation, and its reading of the raw rows, also run in two processes, whose start counts. Their
output must be equal. `speedup_2_processes` is of the shortest of several runs, because other work on the machine only
adds time; `speedup_of_2_copies` is what the machine's cores would allow: the same work done twice at once by two
independent one-process runs, against doing it twice in turn. `peak_rss_mib` is the RSS of all processes together, while
a million generated rows are read and prepared.

Rows are real Dolly (`--rows`, a JSONL file) where given, else the packaged sample repeated; the tokenizer is that of
`--model`, a folder.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import scale
from benchmarks.harness import arguments, in_process, interleaved, median, report
from finetune_assets.training.process_memory import peak_resident_mib

SHARED = Path(__file__).parents[2] / "shared"
ROWS, MODEL = SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl", SHARED / "models" / "stories260K"


SAMPLED_S = 0.05
"""Time between two readings of the processes' memory."""


def ours(rows: Path, model: Path, out: Path, processes: int) -> int:
    """The project's own preparation."""
    from finetune_assets.config.schema import Data
    from finetune_assets.data.prepare import prepare_dataset
    from finetune_assets.data.tokenization import load_tokenizer

    tokenizer, data = load_tokenizer(str(model)), Data(processes=str(processes))
    return measured(lambda: prepare_dataset(rows, tokenizer, data, "salt", out), out)


def reading(rows: Path, out: Path, processes: int) -> int:
    """The project's own reading of the raw rows."""
    from finetune_assets.config.raw_data_schema import Columns
    from finetune_assets.data.ingest import write_raw
    from finetune_assets.data.readers import SourceFile

    files = [SourceFile(rows.name, rows)]
    return measured(lambda: write_raw(files, Columns(), out, processes=str(processes)), out)


def both(count: int, model: Path, out: Path, processes: int) -> int:
    """Reading and preparation of so many generated rows."""
    from finetune_assets.config.raw_data_schema import Columns
    from finetune_assets.config.schema import Data
    from finetune_assets.data.ingest import PARQUET, write_raw
    from finetune_assets.data.prepare import prepare_dataset
    from finetune_assets.data.readers import SourceFile
    from finetune_assets.data.tokenization import load_tokenizer

    tokenizer, data, rows = load_tokenizer(str(model)), Data(processes=str(processes)), out / "rows.jsonl"
    scale.write_rows(rows, count)

    def work() -> Any:
        write_raw([SourceFile(rows.name, rows)], Columns(), out, processes=str(processes))
        return prepare_dataset(out / PARQUET, tokenizer, data, "salt", out)

    return measured(work, out)


def per_example_map(rows: Path, model: Path, out: Path) -> int:
    """The `datasets.map` recipe, one row at a time."""
    from datasets import Dataset, disable_caching, disable_progress_bars

    from finetune_assets.config.schema import Data
    from finetune_assets.data.tokenization import load_tokenizer

    disable_caching()
    disable_progress_bars()
    tokenizer, data = load_tokenizer(str(model)), Data()
    template, cutoff = data.prompt_template, data.tokenization.cutoff_len

    def tokenize(text: str, add_eos: bool) -> list[int]:
        ids = tokenizer(text, truncation=True, max_length=cutoff)["input_ids"]
        if add_eos and len(ids) < cutoff and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        return ids

    def example(row: dict[str, str]) -> dict[str, list[int]]:
        form = template.prompt_input if row["context"].strip() else template.prompt_no_input
        prompt = form.format(instruction=row["instruction"], context=row["context"])
        ids = tokenize(prompt + row["response"], add_eos=True)
        masked = len(tokenize(prompt, add_eos=False))
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}

    def work() -> Mapped:
        dataset = Dataset(pq.read_table(rows))
        prepared = dataset.map(example, remove_columns=dataset.column_names)
        prepared.save_to_disk(str(out))
        return Mapped(len(prepared))

    return measured(work, out)


@dataclass
class Mapped:
    """Statistics of the `datasets.map` recipe."""

    rows: int


def measured(work: Callable[[], Any], out: Path) -> int:
    """Run `work` once and print its figures as JSON; imports and tokenizer are loaded already."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    with peak_of_all() as peak:
        statistics = asdict(work())
    rows = statistics.get("rows_read", statistics.get("rows"))
    figures = {
        "rows": rows,
        "cpu_seconds": cpu_seconds() - cpu,
        "seconds": time.perf_counter() - wall,
        "peak_rss_mib": peak[0],
        "digest": digest(out, statistics),
    }
    print(json.dumps({**figures, "rows_per_cpu_second": rows / figures["cpu_seconds"]}))
    return rows


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def peak_of_all() -> Iterator[list[float]]:
    """The highest sum of the RSS of this process and of its children, in MiB; pages that they share count in each."""
    peak, ended = [peak_resident_mib()], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLED_S):
            peak[0] = max(peak[0], sum(resident_mib(pid) for pid in [os.getpid(), *children()]))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
        peak[0] = max(peak[0], peak_resident_mib())


def children() -> list[int]:
    """PIDs of this process's children, without those that are about to start another program and share its memory."""
    pids, own = [], Path("/proc/self/cmdline").read_bytes()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread or the child has ended
            for pid in (task / "children").read_text().split():
                if Path(f"/proc/{pid}/cmdline").read_bytes() != own:
                    pids.append(int(pid))
    return pids


def resident_mib(pid: int) -> float:
    """RSS of a process; 0 if it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0.0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def digest(out: Path, statistics: dict[str, Any]) -> str:
    """Hash of all files of a folder and of the statistics."""
    digest = hashlib.sha256(json.dumps(statistics, sort_keys=True).encode())
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def write_rows(source: Path, times: int, limit: int | None, out: Path) -> Path:
    """Parquet of the source's rows, repeated with a running number so that no two are the same."""
    from finetune_assets.config.raw_data_schema import Columns
    from finetune_assets.data.ingest import PARQUET, write_raw
    from finetune_assets.data.raw_schema import RAW_SCHEMA
    from finetune_assets.data.readers import SourceFile

    with tempfile.TemporaryDirectory() as folder:
        write_raw([SourceFile(source.name, source)], Columns(), Path(folder))
        rows = pq.read_table(Path(folder) / PARQUET).to_pylist()[:limit]
    with pq.ParquetWriter(out, RAW_SCHEMA) as writer:
        for i in range(times):
            numbered = rows if i == 0 else [{**row, "instruction": f"{row['instruction']} {i}"} for row in rows]
            writer.write_table(pa.Table.from_pylist(numbered, schema=RAW_SCHEMA))
    return out


def one_side(name: str, rows: Path | int, model: Path, processes: int = 1) -> dict[str, Any]:
    """One side in a fresh process."""
    with tempfile.TemporaryDirectory() as out:
        options = {"--side": name, "--rows": rows, "--model": model, "--out": out, "--processes": processes}
        return in_process("benchmarks.data_prep", *(str(text) for pair in options.items() for text in pair))


def two_copies(rows: Path, model: Path) -> dict[str, Any]:
    """Two independent one-process runs at once; the seconds of the later one."""
    with ThreadPoolExecutor(2) as threads:
        return max(threads.map(lambda _: one_side("ours", rows, model), range(2)), key=lambda run: run["seconds"])


def run_side(args: argparse.Namespace) -> None:
    """Measure one side in this process."""
    if args.side == "ours":
        ours(Path(args.rows), args.model, args.out, args.processes)
    elif args.side == "map":
        per_example_map(Path(args.rows), args.model, args.out)
    elif args.side == "reading":
        reading(Path(args.rows), args.out, args.processes)
    else:
        both(int(args.rows), args.model, args.out, args.processes)


def equal(runs: list[dict[str, Any]]) -> bool:
    """Whether all runs gave the same bytes."""
    return len({run["digest"] for run in runs}) == 1


def shortest(runs: list[dict[str, Any]]) -> float:
    return min(run["seconds"] for run in runs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", default=str(ROWS), help="JSONL file of rows in Dolly's schema")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with the tokenizer")
    parser.add_argument("--million", type=int, default=1_000_000, help="number of generated rows")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.side:
        run_side(args)
        return
    source = Path(args.rows)
    if not source.exists() or not args.model.exists():
        sys.exit(f"{args.rows} or {args.model} is missing: give --rows FILE.jsonl --model FOLDER")

    with tempfile.TemporaryDirectory() as folder:
        limit = 2_000 if args.quick else None
        once = write_rows(source, 1, limit, Path(folder) / "once.parquet")
        tenfold = write_rows(source, 10, limit, Path(folder) / "tenfold.parquet")
        sides = {
            "ours": lambda: one_side("ours", once, args.model),
            "ours in 2 processes": lambda: one_side("ours", once, args.model, 2),
            "two copies of ours": lambda: two_copies(once, args.model),
            "map": lambda: one_side("map", once, args.model),
            "reading": lambda: one_side("reading", source, args.model),
            "reading in 2 processes": lambda: one_side("reading", source, args.model, 2),
        }
        runs = interleaved(sides, 1 if args.quick else 3)
        print("ten times the rows, then a million generated rows; minutes", file=sys.stderr, flush=True)
        large = one_side("ours", tenfold, args.model)
        many = one_side("both", min(args.million, 20_000) if args.quick else args.million, args.model, 2)

    speed = {name: median(runs[name], "rows_per_cpu_second") for name in runs}
    if not all(equal(runs[name] + runs[f"{name} in 2 processes"]) for name in ("ours", "reading")):
        sys.exit("the output of two processes differs from that of one")
    ratios = {
        "rows_per_cpu_s_vs_map": speed["ours"] / speed["map"],
        "time_growth_for_10x_rows": large["cpu_seconds"] / median(runs["ours"], "cpu_seconds"),
        "speedup_2_processes": shortest(runs["ours"]) / shortest(runs["ours in 2 processes"]),
        "speedup_of_2_copies": 2 * shortest(runs["ours"]) / shortest(runs["two copies of ours"]),
        "reading_speedup_2_processes": shortest(runs["reading"]) / shortest(runs["reading in 2 processes"]),
        "peak_rss_mib": many["peak_rss_mib"],
    }
    rows = [(f"{name}: rows per CPU-second", f"{value:,.0f}") for name, value in speed.items()]
    rows += [(f"{name}: shortest, seconds", f"{shortest(measured):.2f}") for name, measured in runs.items()]
    rows += [(f"{name}: peak RSS", f"{median(measured, 'peak_rss_mib'):,.0f} MiB") for name, measured in runs.items()]
    rows.append((f"{many['rows']:,} rows, read and prepared: seconds", f"{many['seconds']:,.0f}"))
    report(
        f"Data preparation, {median(runs['ours'], 'rows'):,.0f} rows, and ten times as many", rows, ratios, args.json
    )


if __name__ == "__main__":
    main()
