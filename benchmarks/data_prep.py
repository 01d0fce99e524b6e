"""Preparing rows to training-ready, against the per-example `datasets.map` recipe: `python -m benchmarks.data_prep`.

The recipe is the one that LoRA examples have used since Alpaca-LoRA: for each row, tokenize prompt and response, then
the prompt alone, and mask as many labels as that had tokens. Both sides begin from the same Parquet file and end with
ids and labels in Arrow on disk, with the same template, tokenizer and cut-off, one process, no helper threads.

Rows are real Dolly (`--rows`, a JSONL file) where given, else the packaged sample repeated; the tokenizer is that of
`--model`, a folder.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import arguments, in_process, interleaved, median, report
from finetune_assets.training.process_memory import peak_resident_mib

SHARED = Path(__file__).parents[2] / "shared"
ROWS, MODEL = SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl", SHARED / "models" / "stories260K"


def ours(rows: Path, model: Path, out: Path) -> int:
    """The project's own preparation."""
    from finetune_assets.config.schema import Data
    from finetune_assets.data.prepare import prepare_dataset
    from finetune_assets.data.tokenization import load_tokenizer

    tokenizer = load_tokenizer(str(model))

    def work() -> int:
        return prepare_dataset(rows, tokenizer, Data(), "salt", out).rows_read

    return measured(work)


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

    def work() -> int:
        dataset = Dataset(pq.read_table(rows))
        prepared = dataset.map(example, remove_columns=dataset.column_names)
        prepared.save_to_disk(str(out))
        return len(prepared)

    return measured(work)


def measured(work: Any) -> int:
    """Run `work` once and print its figures as JSON; imports and tokenizer are loaded already."""
    cpu, wall = time.process_time(), time.perf_counter()
    rows = work()
    figures = {
        "rows": rows,
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.perf_counter() - wall,
        "peak_rss_mib": peak_resident_mib(),
    }
    print(json.dumps({**figures, "rows_per_cpu_second": rows / figures["cpu_seconds"]}))
    return rows


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


def one_side(name: str, rows: Path, model: Path) -> dict[str, float]:
    """One side in a fresh process."""
    with tempfile.TemporaryDirectory() as out:
        return in_process(
            "benchmarks.data_prep", "--side", name, "--rows", str(rows), "--model", str(model), "--out", out
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSONL file of rows in Dolly's schema")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with the tokenizer")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.side:
        {"ours": ours, "map": per_example_map}[args.side](args.rows, args.model, args.out)
        return
    if not args.rows.exists() or not args.model.exists():
        sys.exit(f"{args.rows} or {args.model} is missing: give --rows FILE.jsonl --model FOLDER")

    with tempfile.TemporaryDirectory() as folder:
        limit = 2_000 if args.quick else None
        once = write_rows(args.rows, 1, limit, Path(folder) / "once.parquet")
        tenfold = write_rows(args.rows, 10, limit, Path(folder) / "tenfold.parquet")
        sides = {name: lambda name=name: one_side(name, once, args.model) for name in ("ours", "map")}
        runs = interleaved(sides, 1 if args.quick else 3)
        large = interleaved({"ours": lambda: one_side("ours", tenfold, args.model)}, 1)["ours"]

    speed = {name: median(measured, "rows_per_cpu_second") for name, measured in runs.items()}
    ratios = {
        "rows_per_cpu_s_vs_map": speed["ours"] / speed["map"],
        "time_growth_for_10x_rows": median(large, "cpu_seconds") / median(runs["ours"], "cpu_seconds"),
        "peak_rss_mib": median(large, "peak_rss_mib"),
    }
    rows = [(f"{name}: rows per CPU-second", f"{value:,.0f}") for name, value in speed.items()]
    rows += [(f"{name}: peak RSS", f"{median(measured, 'peak_rss_mib'):,.0f} MiB") for name, measured in runs.items()]
    report(
        f"Data preparation, {median(runs['ours'], 'rows'):,.0f} rows, and ten times as many", rows, ratios, args.json
    )


if __name__ == "__main__":
    main()
