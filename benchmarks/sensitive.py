"""Secrets and personal data in real rows, and what the search costs: `python -m benchmarks.sensitive`.

Prints each finding with the text around it, for a reader to judge, and the CPU time of the search beside that of all
else in reading the rows. Rows are real Dolly (`--rows`, files or folders; text files count as one row each).
"""

import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks.data_prep import ROWS
from benchmarks.harness import arguments, median, report
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data import ingest
from finetune_assets.data.readers import SourceFile, SourceRecord, read_records
from finetune_assets.data.rows import Row
from finetune_assets.data.sensitive import ScannedRows, find, masked, scan_rows

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


def read(path: Path) -> dict[str, float]:
    """CPU time of reading the rows of a file, and of the search within it, in microseconds per row."""
    spent = 0.0

    def timed(rows: list[Row]) -> ScannedRows:
        nonlocal spent
        began = time.process_time()
        scanned = scan_rows(rows)
        spent += time.process_time() - began
        return scanned

    with tempfile.TemporaryDirectory() as out, patch.object(ingest, "scan_rows", timed):
        began = time.process_time()
        rows = ingest.write_raw([SourceFile(path.name, path)], Columns(), Path(out), processes="1").rows
        seconds = time.process_time() - began
    return {"rows": rows, "search": spent / rows * 1e6, "rest": (seconds - spent) / rows * 1e6}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="file of rows, or text files to search only")
    args = parser.parse_args()
    rows = [(kind, f"{count:,}") for kind, count in sorted(findings(args.rows).items())]
    if args.rows.is_dir() or args.rows.suffix in TEXT_FILES:
        report("Findings", rows, {}, args.json)
        return
    read(args.rows)  # imports
    runs = [read(args.rows) for _ in range(1 if args.quick else 7)]
    cost = {part: median(runs, part) for part in ("search", "rest")}
    rows += [(f"CPU microseconds per row, {part}", f"{value:.1f}") for part, value in cost.items()]
    ratio = {"search_vs_rest": cost["search"] / cost["rest"]}
    report(f"{median(runs, 'rows'):,.0f} rows", rows, ratio, args.json)


if __name__ == "__main__":
    main()
