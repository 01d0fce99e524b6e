"""Every setting of the raw data, `configs/raw_data.yaml`: schema, defaults and documentation, as in `schema.py`."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from finetune_assets.config.fields import ADDED, NOT_IDENTITY, not_identity

PACKAGED_ROWS = ("sample", "sample-towns")
"""Values of `source` that name packaged rows: about towns that the packaged base model knows, and about the packaged
documents."""


@dataclass
class Columns:
    """Column names of the source, if they differ from the known names."""

    instruction: str | None = None
    """The instruction; `null` uses `instruction`, `question`, `prompt` or `query`."""
    context: str | None = None
    """Context for the answer; `null` uses `context`, `input` or `passage`."""
    response: str | None = None
    """The answer to learn; `null` uses `response`, `output`, `answer` or `completion`."""
    category: str | None = None
    """Category of the task; `null` uses `category`."""
    system: str | None = None
    """System prompt; `null` uses `system`, `system_prompt` or `system_message`."""
    messages: str | None = None
    """A conversation: a list of turns with `role` and `content` (or `from` and `value`); `null` uses `messages` or
    `conversations`."""
    chosen: str | None = field(default=None, metadata=ADDED)
    """The better answer of a pair; `null` uses `chosen` or `chosen_response`, or else the response."""
    rejected: str | None = field(default=None, metadata=ADDED)
    """The worse answer of a pair; `null` uses `rejected` or `rejected_response`."""
    label: str | None = field(default=None, metadata=ADDED)
    """Whether an answer is good: true or false, up or down, 1 or 0; `null` uses `label` or `kto_tag` where they are
    true or false, and `thumbs`."""
    adapter: str | None = field(default=None, metadata=ADDED)
    """Name of the served adapter that gave a rejected or labelled answer; `null` uses `adapter`."""
    ignore: list[str] = field(default_factory=list, metadata=ADDED)
    """Columns to pass over, although they have a known name, or hold what a row cannot (such as images)."""


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
    """Near-duplicate rows (see `near_duplicates`) that are not exact duplicates; above it, the check `near_duplicates`
    warns."""
    max_leakage_share: float = 0.01
    """Rows whose instruction contains their response; above it, the blocking check `leakage` fails."""
    max_sensitive_share: float = 0.0
    """Rows with a secret or personal data; above it, the check `sensitive` warns."""
    max_row_fall: float = 0.5
    """Maximum drop of the row count since the last good version, before the blocking check `row_count` fails."""
    max_drift: float = 0.2
    """Total variation distance (0 to 1) of categories or lengths from the last good version; above it, the check
    `drift` warns."""
    near_duplicates: Literal["minhash", "folded"] = "minhash"
    """Near-duplicate rows: `minhash` counts rows whose three-word sequences have an estimated Jaccard index of at least
    0.8; `folded` only rows that are equal up to case, spaces and punctuation, in less time and memory. Takes effect
    when new data is read."""


@dataclass
class RawSource:
    """One of several sources of raw data."""

    source: str = MISSING
    """As the setting `source` of a single one."""
    columns: Columns = field(default_factory=Columns)
    """Column names of this source."""
    hub: HubDataset = field(default_factory=HubDataset)
    """Part of a Hub dataset to read."""
    weight: float | None = None
    """Share of the training tokens of an epoch, relative to the weights of the other sources; `null` for all sources
    uses every row. Rows beyond the share are chosen by content, left out of training, and counted."""
    max_rows: int | None = None
    """Maximum number of rows, chosen by content; `null` uses all."""
    license: str = ""
    """License of the rows, shown with each version."""


@dataclass
class RawDataConfig:
    """The deployment's stream of raw data: `configs/raw_data.yaml`."""

    source: str = "sample"
    """`sample` (the packaged rows) or `sample-towns` (packaged questions about the packaged documents); a file or a
    folder of `.jsonl`, `.json`, `.csv` and `.parquet` files (also `.ndjson`, `.tsv` and `.arrow`; text also
    compressed), also `s3://bucket/folder`; or `hf://datasets/owner/name@revision` (branch, tag or commit; default
    `main`).
    The environment variable `FINETUNE_RAW_DATA` overrides it, and `sources`."""
    sources: dict[str, RawSource] = field(default_factory=dict)
    """Several named sources, in place of `source`, `columns` and `hub`. Each experiment uses all of them, or those that
    its setting `data.sources` names."""
    columns: Columns = field(default_factory=Columns)
    """Column names of the source."""
    hub: HubDataset = field(default_factory=HubDataset)
    """Part of a Hub dataset to read."""
    max_quarantine_share: float = not_identity(0.01)
    """Maximum fraction of invalid rows for the blocking check `quarantine`. Invalid rows are kept in quarantine."""
    checks: RawChecks = field(default_factory=RawChecks, metadata=NOT_IDENTITY)
    """Thresholds of the other checks."""
    processes: str = not_identity("auto")
    """Number of processes that inspect the rows on this machine (duplicates, secrets, leaked answers), with the one
    that reads them; `auto` uses the cores of this job, up to 16, and one for small files. The raw data is the same with
    every number."""
    arrivals: Arrivals = field(default_factory=Arrivals, metadata=NOT_IDENTITY)
    """When new data is read automatically."""
    split_salt: str = "finetune-assets"
    """Salt of the content hash that assigns a row to a split. Changing it reassigns every row."""
