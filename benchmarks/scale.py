"""Rows by the million, from a JSON Lines file to training-ready: `python -m benchmarks.scale`.

Generated rows go through both assets' work in one process: read, checked and written as Parquet; then split, tokenized,
masked and packed. What it shows is that neither memory nor time a row grows with their number.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.harness import arguments, in_process, report
from finetune_assets.training.process_memory import peak_resident_mib

WORDS = "Kelm river the Why because of twelve it. And so on, winter harvest town bridge".split()


def write_rows(path: Path, count: int) -> None:
    """So many different rows of Dolly's schema, a third of them with a context."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "instruction": f"Question {i} {' '.join(rng.choices(WORDS, k=8))}",
                "context": " ".join(rng.choices(WORDS, k=rng.randint(1, 40))) if i % 3 == 0 else "",
                "response": " ".join(rng.choices(WORDS, k=rng.randint(1, 30))),
                "category": f"kind {i % 7}",
            }
            file.write(json.dumps(row) + "\n")


def prepare(count: int) -> dict[str, float]:
    """Figures of one run; imports and tokenizer are loaded before the clock starts."""
    from finetune_assets.config.raw_data_schema import Columns
    from finetune_assets.config.schema import Data
    from finetune_assets.data.ingest import PARQUET, write_raw
    from finetune_assets.data.prepare import prepare_dataset
    from finetune_assets.data.readers import SourceFile
    from finetune_assets.data.tokenization import load_tokenizer
    from finetune_assets.sources.base_models import PACKAGED

    tokenizer = load_tokenizer(str(PACKAGED["demo-base"]))
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.jsonl", Path(folder)
        write_rows(rows, count)
        raw, raw_seconds = timed(lambda: write_raw([SourceFile(rows.name, rows)], Columns(), out, processes="1"))
        made, seconds = timed(lambda: prepare_dataset(out / PARQUET, tokenizer, Data(processes="1"), "salt", out))
    return {
        "rows": raw.rows,
        "examples": sum(made.examples.values()),
        "microseconds_per_row": (raw_seconds + seconds) / count * 1e6,
        "peak_rss_mib": peak_resident_mib(),
    }


T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and the CPU seconds of this process that it took."""
    began = time.process_time()
    return work(), time.process_time() - began


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.alone:
        print(json.dumps(prepare(args.rows)))
        return
    many = 100_000 if args.quick else args.rows
    few, large = (in_process("benchmarks.scale", "--alone", "--rows", str(count)) for count in (15_000, many))
    ratios = {
        "time_per_row_vs_15k": large["microseconds_per_row"] / few["microseconds_per_row"],
        "peak_rss_mib": large["peak_rss_mib"],
    }
    rows = [
        (f"{side['rows']:,.0f} rows: {name.replace('_', ' ')}", f"{side[name]:,.0f}")
        for side in (few, large)
        for name in ("microseconds_per_row", "peak_rss_mib")
    ]
    report(f"Rows by the {many:,}", rows, ratios, args.json)


if __name__ == "__main__":
    main()
