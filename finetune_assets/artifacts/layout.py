"""What the files of an adapter, an evaluation, a merged model and a report are called.

For who writes and who reads them.
"""

from pathlib import Path

from finetune_assets.store.hashing import sha256

CARD = "README.md"
CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
TRAINER_STATE = "trainer_state.json"
UTILISATION = "gpu_utilisation.csv"
"""What the GPUs did while an adapter was trained; none without a GPU."""
UPDATES = "updates.json"
"""How large the update of each module is."""
NOT_ON_THE_HUB = ("packaged/", "local/")
"""With which the names of base models begin that lie in no repository."""
HELD_BACK = "held_back"
"""Key of a provenance: the rows that an adapter and those it began from were not trained on, as `HoldoutRows`."""
SUMS = "SHA256SUMS"
"""What each file is, as `sha256sum --check` reads it."""
EVALUATION = "evaluation.json"
"""Metrics of each contender, the categories' losses, answers side by side."""
ROWS = "rows.parquet"
"""Each row's tokens and summed loss by each contender."""
PLAN = "plan.json"
"""What a training was expected to take."""
MERGE = "merge.json"
"""How far a merged model is from base and adapter."""
PAGE, PAGE_MARKDOWN, PAGE_NUMBERS = "report.html", "report.md", "report.json"
"""All experiments on one page, and what it was made of."""


def write_sums(folder: Path) -> None:
    """Say what each file of a folder is."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
