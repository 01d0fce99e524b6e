"""File names of adapters, evaluations, merged models and reports, shared by writers and readers."""

from pathlib import Path
from typing import Any

from finetune_assets.store.hashing import sha256
from finetune_assets.store.json_object import InvalidJson, parse_object

CARD = "README.md"
CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
TRAINER_STATE = "trainer_state.json"
UTILISATION = "gpu_utilisation.csv"
"""GPU utilization during the training of an adapter; absent without a GPU."""
UPDATES = "updates.json"
"""Size of the update of each module."""
NOT_ON_THE_HUB = ("packaged/", "local/")
"""Prefixes of the names of base models without a Hub repository."""
HELD_BACK = "held_back"
"""Provenance key: rows that an adapter and its warm-start ancestors were not trained on, as `HoldoutRows`."""
SOURCES = "sources"
"""Provenance key: names of the raw data sources that an adapter is trained on."""
JUDGED_ADAPTERS = "judged_adapters"
"""Provenance key: fingerprints of the served adapters that gave the rejected and labelled answers, by served name."""
CHAMPION_AT_START = "champion_at_start"
"""Provenance key: champion that a training began from, or compared judged answers with."""
REFERENCE_LOG_PROBS = "reference.arrow"
"""Log-probabilities of judged answers under the reference model of a training."""
SUMS = "SHA256SUMS"
"""Checksums of all files, in the format of `sha256sum --check`."""
SIGNATURE = "model.sig"
"""Signature of all files, in the format of OpenSSF's model-signing; only of adapters that were signed."""
EVALUATION = "evaluation.json"
"""Metrics of each contender, losses by category, and answers side by side."""
ROWS = "rows.parquet"
"""Number of tokens and summed loss of each row, by contender."""
PREFERENCES = "preferences.parquet"
"""Log-probability of chosen minus rejected answer of each pair, by contender; only of experiments with judgements."""
PLAN = "plan.json"
"""Predicted time, memory and cost of a training."""
MERGE = "merge.json"
"""Differences between a merged model and base plus adapter."""
PAGE, PAGE_MARKDOWN, PAGE_NUMBERS = "report.html", "report.md", "report.json"
"""The overview of all experiments as HTML and as Markdown, and the data of the report as JSON."""


def write_sums(folder: Path) -> None:
    """Write the checksums of all files in a folder to `SHA256SUMS`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a folder from elsewhere; empty if the file is missing or contains something else."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, InvalidJson):
        return {}
