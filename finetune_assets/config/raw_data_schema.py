"""Every setting of the raw data, `configs/raw_data.yaml`: schema, defaults and documentation, as in `schema.py`."""

from dataclasses import dataclass, field

from finetune_assets.config.fields import NOT_IDENTITY, not_identity


@dataclass
class Columns:
    """Column names of the source, if they differ from the known names."""

    instruction: str | None = None
    """The instruction; `null` uses `instruction`."""
    context: str | None = None
    """Context for the answer; `null` uses `context` or `input`."""
    response: str | None = None
    """The answer to learn; `null` uses `response` or `output`."""
    category: str | None = None
    """Category of the task; `null` uses `category`."""
    system: str | None = None
    """System prompt; `null` uses `system`."""
    messages: str | None = None
    """A conversation: a list of turns with `role` and `content` (or `from` and `value`); `null` uses `messages` or
    `conversations`."""


@dataclass
class HubDataset:
    """Part of a Hub dataset to read."""

    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split of the dataset to read. Held-out rows are chosen from it by content."""


@dataclass
class Arrivals:
    """When new raw data is read automatically (`raw_data_sensor`), and the daily training budget."""

    quiet_seconds: float = 4.0
    """Debounce time, in seconds: the source is read when it has not changed for this long. Files that arrive together
    are read together. Writers that pause longer should use a name with a leading dot until the file is complete."""
    min_new_rows: int = 0
    """Minimum change in the number of rows since the last read."""
    max_wait_seconds: float = 3600.0
    """Read a smaller change after this time, in seconds."""
    gpu_hours_a_day: float | None = None
    """Daily budget of automatic trainings (UTC), in GPU-hours; further trainings are deferred to the next day. `null`
    sets no limit."""


@dataclass
class RawChecks:
    """Thresholds of the checks of `dolly_raw`, as fractions of all rows from 0 to 1."""

    max_duplicate_share: float = 0.05
    """Exact duplicate rows; above it, the blocking check `duplicates` fails."""
    max_near_duplicate_share: float = 0.1
    """Near-duplicate rows (equal up to case, spaces and punctuation); above it, the check `near_duplicates` warns."""
    max_leakage_share: float = 0.01
    """Rows whose instruction contains their response; above it, the blocking check `leakage` fails."""
    max_sensitive_share: float = 0.0
    """Rows with a secret or personal data; above it, the check `sensitive` warns."""
    max_row_fall: float = 0.5
    """Maximum drop of the row count since the last good version, before the blocking check `row_count` fails."""
    max_drift: float = 0.2
    """Total variation distance (0 to 1) of categories or lengths from the last good version; above it, the check
    `drift` warns."""


@dataclass
class RawDataConfig:
    """The deployment's stream of raw data: `configs/raw_data.yaml`."""

    source: str = "sample"
    """`sample` (the packaged rows); a file or a folder of `.jsonl`, `.json`, `.csv` and `.parquet` files, also
    `s3://bucket/prefix`; or `hf://datasets/owner/name@revision` (branch, tag or commit; default `main`).
    The environment variable `FINETUNE_RAW_DATA` overrides it."""
    columns: Columns = field(default_factory=Columns)
    """Column names of the source."""
    hub: HubDataset = field(default_factory=HubDataset)
    """Part of a Hub dataset to read."""
    max_quarantine_share: float = not_identity(0.01)
    """Maximum fraction of invalid rows for the blocking check `quarantine`. Invalid rows are kept in quarantine."""
    checks: RawChecks = field(default_factory=RawChecks, metadata=NOT_IDENTITY)
    """Thresholds of the other checks."""
    arrivals: Arrivals = field(default_factory=Arrivals, metadata=NOT_IDENTITY)
    """When new data is read automatically."""
    split_salt: str = "finetune-assets"
    """Salt of the content hash that assigns a row to a split. Changing it reassigns every row."""
