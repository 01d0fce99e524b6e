"""Secrets and personal data in real rows, and what the search costs: `python -m benchmarks.sensitive`.

Prints each finding with the text around it, for a reader to judge, and the CPU time of reading the rows with the search
and without it, in turn. Rows are real Dolly (`--rows`, files or folders; text files count as one row each).
"""

import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks.data_prep import ROWS
from benchmarks.harness import arguments, interleaved, median, report
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data import ingest
from finetune_assets.data.readers import SourceFile, SourceRecord, read_records
from finetune_assets.data.sensitive import SensitiveScan, find, masked

AROUND = 40
TEXT_FILES = (".py", ".md", ".rst", ".txt", ".js", ".html", ".yaml", ".toml")


def texts(path: Path) -> list[tuple[str, str]]:
    """Texts of a file or folder, each with where it is."""
    if path.is_dir():
        return [text for file in sorted(path.rglob("*")) if file.suffix in TEXT_FILES for text in texts(file)]
    if path.suffix in TEXT_FILES:
        return [(str(path), path.read_text(encoding="utf-8", errors="replace"))]
    records = [record for record in read_records(path) if isinstance(record, SourceRecord)]
    return [(f"{path.name}:{record.line}", str(value)) for record in records for value in record.row.values()]


def findings(path: Path) -> dict[str, int]:
    """Number of findings by kind; prints each."""
    counts: dict[str, int] = {}
    for where, text in texts(path):
        for finding in find(text):
            kind = f"{finding.kind} (example)" if finding.is_example else finding.kind
            counts[kind] = counts.get(kind, 0) + 1
            around = masked(text[max(0, finding.start - AROUND) : finding.end + AROUND])
            print(f"{where}: {kind}: {around!r}")
    return counts


def read(path: Path, searches: bool) -> dict[str, float]:
    """CPU time of reading the rows of a file."""
    look = SensitiveScan.look if searches else lambda scan, rows: None
    with tempfile.TemporaryDirectory() as out, patch.object(SensitiveScan, "look", look):
        began = time.process_time()
        statistics = ingest.write_raw([SourceFile(path.name, path)], Columns(), Path(out))
        seconds = time.process_time() - began
    return {"rows": statistics.rows, "microseconds": seconds / statistics.rows * 1e6}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="file of rows, or text files to search only")
    args = parser.parse_args()
    rows = [(kind, f"{count:,}") for kind, count in sorted(findings(args.rows).items())]
    if args.rows.is_dir() or args.rows.suffix in TEXT_FILES:
        report("Findings", rows, {}, args.json)
        return
    sides = {"with": lambda: read(args.rows, True), "without": lambda: read(args.rows, False)}
    interleaved(sides, 1)  # imports
    runs = interleaved(sides, 1 if args.quick else 5)
    cost = {name: median(measured, "microseconds") for name, measured in runs.items()}
    rows += [(f"CPU microseconds per row, {name} the search", f"{value:.0f}") for name, value in cost.items()]
    ratios = {"search_vs_read": cost["with"] / cost["without"] - 1}
    report(f"{median(runs['with'], 'rows'):,.0f} rows", rows, ratios, args.json)


if __name__ == "__main__":
    main()
