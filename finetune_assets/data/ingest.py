"""Converts the source's files to the raw data artifact: good rows as Parquet, bad rows in a quarantine file."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_assets.config.cluster import AUTO
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow, DataError
from finetune_assets.data.layouts import RowReader
from finetune_assets.data.near_duplicates import THRESHOLD
from finetune_assets.data.processes import Processes, process_count
from finetune_assets.data.quality import InspectedRows, Inspector, Quality, inspect_rows
from finetune_assets.data.raw_files import rows_at
from finetune_assets.data.raw_schema import RAW_SCHEMA
from finetune_assets.data.readers import SourceFile, SourceRecord, Unreadable, kept, read_records
from finetune_assets.data.rows import Row, RowKind, kind_of
from finetune_assets.data.sensitive import ScannedRows, Sensitive, SensitiveScan, masked, masked_values, scan_rows
from finetune_assets.progress import ROWS, Progress

PARQUET, QUARANTINE = "rows.parquet", "quarantine.jsonl"
ROWS_PER_BATCH, BATCH_CHARACTERS = 5_000, 64 << 20
"""Maximum size of a batch, in rows and in characters, after which it is written."""
INSPECTED_ROWS, INSPECTED_CHARACTERS = 1_000, 8 << 20
"""Maximum size of a part of a batch that is inspected at a time."""
BYTES_PER_PROCESS = 4 << 20
"""Size of the files for each process with `auto`: about twice what is read in the time that a process takes to start;
the 13 MB of Dolly are read 1.4 times as fast by two processes (benchmarks/RESULTS.md)."""
SHOWN = 5
"""Maximum number of rows in each preview of good and bad rows."""
REASONS = 50
"""Maximum number of distinct reasons that are counted separately."""
CATEGORIES, LONGEST_CATEGORY, OTHER_CATEGORIES = 10_000, 200, "other categories"
"""Maximum number of categories that are counted separately, and characters of their names."""
NAMED = 100
"""Maximum number of ignored columns, and of files with bad rows, that are named."""
WHERE = re.compile(r" at column \d+")
"""Part of a reason that differs between rows with the same problem."""
logger = logging.getLogger(__name__)


@dataclass
class RawStatistics:
    """Statistics of one version of the raw data.

    Attributes:
        rows: Number of good rows.
        conversations: Number of good rows with more than instruction and response.
        pairs: Number of good rows with a chosen and a rejected answer.
        labelled: Number of good rows with an answer that is labelled good or bad.
        with_context: Number of good rows with a context (or a system turn).
        quarantined: Number of bad rows.
        reasons: Number of bad rows by reason.
        categories: Number of good rows by category.
        preview: The first good rows that are not conversations.
        conversation_preview: The first conversations.
        first_quarantined: The first bad rows of the files in `quarantined_by_file`: file, line, reason, text.
        quarantined_by_file: Number of bad rows and of all rows by file, highest fraction of bad rows first.
        files_without_rows: Files without a good row.
        files_without_column: Files in which no row has a column that the settings name, by column.
        ignored_columns: Number of good rows with a value in a column that is not read, by column.
        ignored_files: Files of a source that never changes, such as a commit, which are not read.
        quality: Quality problems of good rows.
        shown: Rows that `quality` names, by row number.
        sensitive: Secrets and personal data in good rows. In all other texts of the statistics they are hidden.
    """

    rows: int = 0
    conversations: int = 0
    pairs: int = 0
    labelled: int = 0
    with_context: int = 0
    quarantined: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    preview: list[Row] = field(default_factory=list)
    conversation_preview: list[Row] = field(default_factory=list)
    first_quarantined: list[dict[str, Any]] = field(default_factory=list)
    quarantined_by_file: dict[str, tuple[int, int]] = field(default_factory=dict)
    files_without_rows: list[str] = field(default_factory=list)
    files_without_column: dict[str, list[str]] = field(default_factory=dict)
    ignored_columns: dict[str, int] = field(default_factory=dict)
    ignored_files: list[str] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)
    shown: dict[str, Row] = field(default_factory=dict)
    sensitive: Sensitive = field(default_factory=Sensitive)

    @property
    def quarantine_share(self) -> float:
        return self.quarantined / (self.rows + self.quarantined)


def write_raw(
    files: Sequence[SourceFile],
    columns: Columns,
    out: Path,
    near_duplicate_threshold: float | None = THRESHOLD,
    processes: str = AUTO,
) -> RawStatistics:
    """Write `out/rows.parquet` and `out/quarantine.jsonl`, with at most some batches of rows in memory.

    This process reads and writes the rows, and others hash, inspect and scan them.

    Args:
        files: Files to read, in order.
        columns: Column names of the source.
        out: Folder to write to.
        near_duplicate_threshold: Minimum similarity of near-duplicate rows; None counts equal rows only.
        processes: Number of processes, or `auto`.

    Raises:
        LostProcess: if one of several processes is killed.
        DataError: if a file as a whole cannot be read, no file contains a row, or no row has a column that the
            settings name.
    """
    counts, scan = RawStatistics(), SensitiveScan()
    categories: Counter[str] = Counter()
    inspector = Inspector(near_duplicate_threshold)
    source_columns = _SourceColumns()
    size = sum(file.path.stat().st_size for file in files if file.path.exists())
    with (
        open(out / QUARANTINE, "w", encoding="utf-8", errors="backslashreplace") as bad,
        pq.ParquetWriter(out / PARQUET, RAW_SCHEMA, compression="zstd") as writer,
        Progress("reading raw data", None, ROWS) as progress,
        Processes(process_count(processes, size, BYTES_PER_PROCESS), "processes (raw_data.yaml)") as inspecting,
    ):
        quarantine = _Quarantine(bad, counts)
        rows = (row for file in files for row in _good_rows(file, columns, quarantine, source_columns))

        def written() -> Iterator[list[Row]]:
            for batch in _batches(rows, ROWS_PER_BATCH, BATCH_CHARACTERS):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=RAW_SCHEMA))
                _count_categories(batch, categories)
                _count(batch, counts)
                progress.reach(counts.rows + counts.quarantined)
                yield from _batches(batch, INSPECTED_ROWS, INSPECTED_CHARACTERS)

        for inspected, scanned in inspecting.map(partial(_inspected, near_duplicate_threshold), written()):
            inspector.add(inspected)
            scan.add(scanned)
    if not counts.rows + counts.quarantined:
        raise DataError(f"{', '.join(str(file.path) for file in files)}: no rows; the file is empty")
    source_columns.sum_up(counts)
    quarantine.sum_up()
    counts.categories = dict(categories.most_common())
    counts.quality = inspector.sum_up()
    counts.shown = _shown(out / PARQUET, counts.quality)
    counts.sensitive = scan.sum_up()
    for name in vars(counts).keys() - {"quality", "sensitive"}:
        setattr(counts, name, masked_values(getattr(counts, name)))
    return counts


def _inspected(threshold: float | None, rows: list[Row]) -> tuple[InspectedRows, ScannedRows]:
    return inspect_rows(rows, threshold), scan_rows(rows)


def _count_categories(batch: list[Row], categories: Counter[str]) -> None:
    """Count the rows of each category; of long names the beginning is kept, and of many names the first."""
    for row in batch:
        name = row["category"]
        name = name if len(name) <= LONGEST_CATEGORY else f"{name[: LONGEST_CATEGORY - 1]}…"
        categories[name if name in categories or len(categories) < CATEGORIES else OTHER_CATEGORIES] += 1


def _shown(parquet: Path, quality: Quality) -> dict[str, Row]:
    pairs = [*quality.first_duplicates, *quality.first_near_duplicates]
    numbers = {number for pair in pairs for number in pair} | {*quality.first_leaked}
    if not numbers:
        return {}
    named = sorted(numbers)
    rows = rows_at([parquet], named)
    return {
        str(number): {**row, "messages": None, "rejected_messages": None}
        for number, row in zip(named, rows, strict=True)
    }


def _count(batch: list[Row], counts: RawStatistics) -> None:
    conversations = [row for row in batch if row["messages"]]
    counts.rows += len(batch)
    counts.conversations += len(conversations)
    kinds = Counter(map(kind_of, batch))
    counts.pairs += kinds[RowKind.PAIR]
    counts.labelled += kinds[RowKind.LABELLED]
    counts.with_context += sum(bool(row["context"].strip()) for row in batch)
    plain = (row for row in batch if not row["messages"])
    counts.preview += islice(plain, SHOWN - len(counts.preview))
    counts.conversation_preview += conversations[: SHOWN - len(counts.conversation_preview)]


def _batches(rows: Iterable[Row], most_rows: int, most_characters: int) -> Iterator[list[Row]]:
    """Batches of at most so many rows, and not much more than so many characters."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        turns = [*(row["messages"] or ()), *(row.get("rejected_messages") or ())]
        size += len(row["instruction"]) + len(row["context"]) + len(row["response"]) + len(row.get("rejected") or "")
        size += sum(len(turn["content"]) + len(turn.get("tool_calls") or "") for turn in turns)
        if len(batch) == most_rows or size > most_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Quarantine:
    """Writes bad rows to the quarantine file and counts them."""

    def __init__(self, file: TextIO, counts: RawStatistics) -> None:
        self.file, self.counts = file, counts
        self._first: list[dict[str, Any]] = []
        self._worst: list[tuple[str, int, int, list[dict[str, Any]]]] = []

    def take(self, file: str, bad: Unreadable) -> None:
        entry = {"file": file, **bad._asdict()}
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.counts.quarantined += 1
        reasons = self.counts.reasons
        reason = WHERE.sub("", bad.reason)
        reason = reason if reason in reasons or len(reasons) < REASONS else "other reasons"
        reasons[reason] = reasons.get(reason, 0) + 1
        if len(self._first) < SHOWN:
            self._first.append({**entry, "text": masked(bad.text)[:500]})

    def end_file(self, file: str, bad: int, good: int) -> None:
        """Count a file; those with the highest fraction of bad rows are kept."""
        if bad:
            self._worst.append((file, bad, bad + good, self._first))
            self._worst = sorted(self._worst, key=lambda worst: -worst[1] / worst[2])[:NAMED]
        self._first = []

    def sum_up(self) -> None:
        """Name the worst files, and show rows of as many of them as possible."""
        self.counts.quarantined_by_file = {file: (bad, rows) for file, bad, rows, _ in self._worst}
        shown = [0] * len(self._worst)
        while sum(shown) < SHOWN and (more := [i for i, worst in enumerate(self._worst) if shown[i] < len(worst[3])]):
            for i in more[: SHOWN - sum(shown)]:
                shown[i] += 1
        self.counts.first_quarantined = [row for i, worst in enumerate(self._worst) for row in worst[3][: shown[i]]]


class _SourceColumns:
    """Columns of all files: those that are not read, and those that the settings name and files lack."""

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}
        self.ignored: Counter[str] = Counter()
        self.settings: dict[str, str] = {}
        self.missing: dict[str, list[str]] = {}
        self.files = 0

    def end_file(self, file: str, reader: RowReader) -> None:
        self.keys |= reader.keys
        self.ignored += reader.ignored
        self.files += bool(reader.keys)
        self.settings |= reader.missing()
        for column in reader.missing():
            self.missing.setdefault(column, []).append(file)

    def sum_up(self, counts: RawStatistics) -> None:
        """Complete the statistics.

        Raises:
            DataError: if no row of any file has a column that the settings name.
        """
        for column, files in self.missing.items():
            setting = self.settings[column]
            if len(files) == self.files:
                found = masked(", ".join(islice(self.keys, NAMED))[:10_000])[:500]
                raise DataError(f"raw_data.yaml: {setting} names '{column}', which no row has; found {found}")
            logger.warning("%s names '%s', which no row of %s has", setting, column, ", ".join(files[:SHOWN]))
        counts.files_without_column = {column: files[:NAMED] for column, files in self.missing.items()}
        counts.ignored_columns = dict(self.ignored.most_common(NAMED))
        if counts.ignored_columns:
            listed = ", ".join(f"{column} ({rows:,} rows)" for column, rows in counts.ignored_columns.items())
            logger.info("Columns that are not read: %s", masked(listed))


def _good_rows(
    file: SourceFile, columns: Columns, quarantine: _Quarantine, source_columns: _SourceColumns
) -> Iterator[Row]:
    read, good, bad_before = RowReader(columns), 0, quarantine.counts.quarantined
    for record in read_records(file.path):
        if isinstance(record, Unreadable):
            quarantine.take(file.name, record)
            continue
        try:
            row = read(record.row)
        except BadRow as e:
            quarantine.take(file.name, Unreadable(record.line, str(e), _source_text(record)))
            continue
        good += 1
        yield row
    if not good:
        quarantine.counts.files_without_rows.append(file.name)
    quarantine.end_file(file.name, quarantine.counts.quarantined - bad_before, good)
    source_columns.end_file(file.name, read)


def _source_text(record: SourceRecord) -> str:
    if record.text is not None:
        return kept(record.text)
    try:
        return kept(json.dumps(record.row, ensure_ascii=False, default=str))
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return ""
