"""Cost and recall of the search for near-duplicates: `python -m benchmarks.near_duplicates`.

Cost: CPU time of the search in both assets (rows of the raw data; training rows against held-out rows), as a fraction
of the CPU time of everything else that they do with the same rows, in one process. Recall: of at most 100,000 rows, 5%
(of at least 40 words) are copied, and single words that are not numbers are replaced until the Jaccard index of
three-word sequences is between 0.85 and 0.95 (computed exactly); the copies that are found are counted. `--peers`
compares with rensa and datasketch, where they are installed; both get three-word sequences made in Python, and 128
permutations.

Rows are real Dolly (`--rows`), and generated ones (`--generated`) of `benchmarks.scale`.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.data_prep import MODEL, ROWS
from benchmarks.harness import arguments, in_process, interleaved, median, report
from benchmarks.scale import timed, write_rows
from finetune_assets.training.process_memory import peak_resident_mib

THRESHOLD, PERMUTATIONS, SHINGLE = 0.8, 128, 3
PLANTED, LEAST_WORDS, MOST_ROWS = 0.05, 40, 100_000


def cost(rows: Path, model: Path) -> dict[str, float]:
    """CPU microseconds a row of the search, and of all else; imports and tokenizer are loaded before."""
    from finetune_assets.config.raw_data_schema import Columns
    from finetune_assets.config.schema import Data
    from finetune_assets.data import prepare, quality, selection
    from finetune_assets.data.ingest import PARQUET, write_raw
    from finetune_assets.data.readers import SourceFile
    from finetune_assets.data.tokenization import load_tokenizer

    tokenizer, spent = load_tokenizer(str(model)), {"quality": 0.0, "prepare": 0.0}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for module, name in (
            *((quality, name) for name in ("words_of", "sign", "earlier_near_duplicates")),
            (selection, "near_duplicates_across"),
        ):
            stack.enter_context(patch.object(module, name, clocked(getattr(module, name), spent)))
        out, files = Path(folder), [SourceFile(rows.name, rows)]
        raw, reading = timed(lambda: write_raw(files, Columns(), out, processes="1"))
        prepared, preparing = timed(
            lambda: prepare.prepare_dataset(out / PARQUET, tokenizer, Data(processes="1"), "salt", out)
        )
    search = sum(spent.values())
    others = reading + preparing - search
    return {
        "rows": raw.rows,
        "near_duplicates": raw.quality.near_duplicates,
        "left_out": prepared.near_duplicates_left_out,
        "search_in_raw_us": spent["quality"] / raw.rows * 1e6,
        "search_across_splits_us": spent["prepare"] / raw.rows * 1e6,
        "others_us": others / raw.rows * 1e6,
        "ratio": search / others,
        "peak_rss_mib": peak_resident_mib(),
    }


def clocked(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    """The function, with its CPU seconds added up by the caller's module."""
    part = "prepare" if function.__name__ == "near_duplicates_across" else "quality"

    def run(*args: Any) -> Any:
        given, seconds = timed(lambda: function(*args))
        spent[part] += seconds
        return given

    return run


def recall(rows: Path) -> dict[str, float]:
    """Fraction of the planted near-duplicates that are found."""
    texts = [text.split() for text in read_texts(rows)]
    rng = random.Random(0)
    long = [number for number, words in enumerate(texts) if len(words) >= LEAST_WORDS]
    chosen = rng.sample(long, min(int(PLANTED * len(texts)), len(long)))
    vocabulary = sorted({word for words in texts[:1_000] for word in words if word.isalpha()})
    planted = [changed(texts[number], vocabulary, rng) for number in chosen]
    pairs = [(number, words) for number, words in zip(chosen, planted, strict=True) if words]
    all_texts = [" ".join(words) for words in [*texts, *(words for _, words in pairs)]]
    earlier = found_by_us(all_texts)
    own = earlier[len(texts) :]
    return {
        "planted": len(pairs),
        "recall": float((own >= 0).mean()),
        "found_in_rows": int((earlier[: len(texts)] >= 0).sum()),
        "similarity": float(np.mean([jaccard(texts[number], words) for number, words in pairs])),
    }


def changed(words: list[str], vocabulary: list[str], rng: random.Random) -> list[str]:
    """The words with single ones replaced, to a Jaccard index between 0.85 and 0.95; nothing if that fails."""
    target, other = rng.uniform(0.85, 0.95), list(words)
    for _ in range(len(words)):
        before, at = list(other), rng.randrange(len(other))
        if not any(map(str.isdigit, other[at])):
            other[at] = rng.choice(vocabulary)
        if jaccard(words, other) < target:
            break
    best = other if jaccard(words, other) >= 0.85 else before
    return best if 0.85 <= jaccard(words, best) <= 0.95 else []


def sequences(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]


def jaccard(one: list[str], other: list[str]) -> float:
    ours, others = set(sequences(one)), set(sequences(other))
    return len(ours & others) / len(ours | others)


def read_texts(rows: Path) -> list[str]:
    with open(rows, encoding="utf-8") as file:
        return [" ".join(str(value) for value in json.loads(line).values()) for line in islice(file, MOST_ROWS)]


def found_by_us(texts: list[str]) -> Any:
    from finetune_assets.data.folding import words_of
    from finetune_assets.data.near_duplicates import GrowingSignatures, earlier_near_duplicates, sign

    signatures = GrowingSignatures()
    for begin in range(0, len(texts), 1_000):
        batch = texts[begin : begin + 1_000]
        signatures.append(sign(words_of(batch), np.arange(len(batch) + 1)))
    return earlier_near_duplicates(signatures.all(), THRESHOLD)


def found_by_rensa(texts: list[str]) -> int:
    from rensa import RMinHash, RMinHashLSH

    lsh, near = RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=16), 0
    kept: list[Any] = []
    for number, text in enumerate(texts):
        minhash = RMinHash(num_perm=PERMUTATIONS, seed=42)
        minhash.update(sequences(text.lower().split()))
        near += any(kept[other].jaccard(minhash) >= THRESHOLD for other in lsh.query(minhash))
        lsh.insert(number, minhash)
        kept.append(minhash)
    return near


def found_by_datasketch(texts: list[str]) -> int:
    from datasketch import MinHash, MinHashLSH

    lsh, near = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS), 0
    kept: list[Any] = []
    for number, text in enumerate(texts):
        minhash = MinHash(num_perm=PERMUTATIONS)
        minhash.update_batch([sequence.encode() for sequence in sequences(text.lower().split())])
        near += any(kept[other].jaccard(minhash) >= THRESHOLD for other in lsh.query(minhash))
        lsh.insert(number, minhash)
        kept.append(minhash)
    return near


PEERS: dict[str, Callable[[list[str]], int]] = {
    "ours": lambda texts: int((found_by_us(texts) >= 0).sum()),
    "rensa": found_by_rensa,
    "datasketch": found_by_datasketch,
}


def peer(name: str, rows: Path) -> dict[str, float]:
    texts = read_texts(rows)
    found, seconds = timed(lambda: PEERS[name](texts))
    return {"near_duplicates": found, "us": seconds / len(texts) * 1e6, "peak_rss_mib": peak_resident_mib()}


def side(name: str, args: argparse.Namespace) -> dict[str, Any]:
    if name == "cost":
        return cost(args.rows, args.model)
    return recall(args.rows) if name == "recall" else peer(name, args.rows)


def sources(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    if args.rows.exists():
        yield "dolly", args.rows
    generated = folder / "generated.jsonl"
    write_rows(generated, 20_000 if args.quick else args.generated)
    yield "generated", generated


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSONL file of rows in Dolly's schema")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with the tokenizer")
    parser.add_argument("--generated", type=int, default=1_000_000, help="number of generated rows")
    parser.add_argument("--peers", action="store_true", help="compare with rensa and datasketch, where installed")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.side:
        print(json.dumps(side(args.side, args)))
        return
    if not args.model.exists():
        sys.exit(f"{args.model} is missing: give --model FOLDER")

    def run(name: str, rows: Path) -> dict[str, Any]:
        return in_process("benchmarks.near_duplicates", "--side", name, "--rows", str(rows), "--model", str(args.model))

    lines: list[tuple[str, str]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source, rows in sources(args, Path(folder)):
            large = source == "generated"
            runs = interleaved({"cost": lambda rows=rows: run("cost", rows)}, 1 if large or args.quick else 3)["cost"]
            planted = run("recall", rows)
            figures = {name: median(runs, name) for name in runs[0]}
            lines += [(f"{source}: {name}", f"{value:,.1f}") for name, value in {**figures, **planted}.items()]
            ratios[f"cost_ratio_{source}"], ratios[f"recall_{source}"] = figures["ratio"], planted["recall"]
            ratios[f"peak_rss_mib_{source}"] = figures["peak_rss_mib"]
            if args.peers and not large:
                present = [name for name in PEERS if name == "ours" or find_spec(name)]
                sides = {name: lambda name=name, rows=rows: run(name, rows) for name in present}
                measured = interleaved(sides, 1 if args.quick else 3)
                for name, theirs in measured.items():
                    lines += [(f"{name}: {key}", f"{median(theirs, key):,.1f}") for key in theirs[0]]
                    ratios[f"us_vs_{name}"] = median(measured["ours"], "us") / median(theirs, "us")
    report("Near-duplicates", lines, ratios, args.json)


if __name__ == "__main__":
    main()
