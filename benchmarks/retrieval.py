"""The index of a document set: its cost, and how well it finds real contexts: `python -m benchmarks.retrieval`.

Cost: 100,000 generated passages of 100 words each (a vocabulary of 50,000 words, as frequent as words are: Zipf) are
read from a Markdown file, compared for near-duplicates and indexed in a process of its own, on one core; then searched
for with 12 words each. Times are CPU times. Quality: the distinct contexts of real rows (`--rows`) as passages, and the
rows' instructions.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_prep import ROWS
from benchmarks.harness import arguments, in_process, report
from finetune_assets.training.process_memory import peak_resident_mib

PASSAGES, WORDS, VOCABULARY, QUERIES, QUERY_WORDS = 100_000, 100, 50_000, 500, 12
CATEGORIES = ("closed_qa", "information_extraction", "summarization")


def write_documents(path: Path, passages: int) -> None:
    """A Markdown file of so many different paragraphs."""
    draw = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(passages):
            print(" ".join(f"w{number}" for number in _words(draw, WORDS)), end="\n\n", file=file)


def _words(draw: np.random.Generator, count: int) -> list[int]:
    return [int(number) for number in draw.zipf(1.2, count) % VOCABULARY]


def cost(passages: int) -> dict[str, float]:
    """Figures of one run in this process."""
    from finetune_assets.config.documents_schema import DocumentColumns, DocumentsConfig
    from finetune_assets.data.readers import SourceFile
    from finetune_assets.retrieval.documents import read_documents
    from finetune_assets.retrieval.index import build_index, open_index

    with tempfile.TemporaryDirectory() as name:
        source, folder = Path(name) / "documents.md", Path(name) / "index"
        folder.mkdir()
        write_documents(source, passages)
        started = time.process_time()
        files = [SourceFile(source.name, source)]
        build_index(read_documents(files, DocumentColumns()), DocumentsConfig(), folder)
        building = time.process_time() - started
        started = time.process_time()
        index = open_index(folder)
        opening = time.process_time() - started
        draw = np.random.default_rng(1)
        queries = [" ".join(f"w{number}" for number in _words(draw, QUERY_WORDS)) for _ in range(QUERIES)]
        times = []
        for query in queries:
            started = time.process_time()
            index.search([query], 10)
            times.append((time.process_time() - started) * 1e3)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "passages": passages,
        "build_cpu_s": building,
        "open_cpu_ms": opening * 1e3,
        "query_cpu_ms": float(np.mean(times)),
        "query_p95_cpu_ms": float(np.percentile(times, 95)),
        "size_mib": size / (1 << 20),
        "peak_rss_mib": peak_resident_mib(),
    }


def quality(rows: Path) -> dict[str, Any]:
    """Hit rates by category of real rows."""
    from finetune_assets.config.documents_schema import DocumentsConfig, PassageSettings
    from finetune_assets.retrieval.documents import Document
    from finetune_assets.retrieval.golden import golden_passages
    from finetune_assets.retrieval.index import build_index, open_index
    from finetune_assets.retrieval.metrics import hit_rate, rank_of

    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    read = [row for row in read if row["context"].strip()]
    with tempfile.TemporaryDirectory() as name:
        config = DocumentsConfig(from_contexts=True, passages=PassageSettings("document"))
        build_index((Document(row["context"], "contexts") for row in read), config, Path(name))
        index, rates = open_index(Path(name)), {}
        for category in CATEGORIES:
            of_it = [row for row in read if row["category"] == category]
            golden = [golden_passages(index.passages, row["context"]) for row in of_it]
            found = index.search([row["instruction"] for row in of_it], 10)
            ranks = [rank_of((hit.passage for hit in hits), known) for known, hits in zip(golden, found, strict=True)]
            measured = hit_rate(ranks)
            rates |= {f"{category}_hit_at_{k}": share for k, share in measured.hits.items()}
            rates[f"{category}_mrr"] = measured.mrr
    return rates


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="real rows; left out where they are not there")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(cost(args.one)))
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    found = in_process("benchmarks.retrieval", "--one", str(PASSAGES // 20 if args.quick else PASSAGES))
    rates = quality(args.rows) if args.rows.exists() else {}
    rows = [(name, f"{found.pop(name):,.1f}") for name in ("passages", "size_mib", "open_cpu_ms")]
    report("Retrieval index, on one core", rows, {**found, **rates}, args.json)


if __name__ == "__main__":
    sys.exit(main())
