"""What the runs of an experiment were made from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_assets.artifacts.base_identity import HUB_ID, RecordedBase
from finetune_assets.artifacts.layout import NOT_ON_THE_HUB, SOURCES
from finetune_assets.artifacts.provenance import text, texts, texts_by_name
from finetune_assets.reporting.runs import Run

HUB = "https://huggingface.co"
COMMIT = re.compile("[0-9a-f]{40}")
INPUTS = {
    "dataset": "tokenized_dataset",
    "raw data": "dolly_raw",
    "base model files": "cached_base_model",
    "retrieval index": "retrieval_index",
    "warm start": "warm_start",
    "champion at start": "champion_at_start",
}
"""Inputs that are fingerprints, by title: keys of an adapter's `made_from`."""


@dataclass(frozen=True)
class RunInput:
    """An input or product of a run.

    Attributes:
        title: What it is.
        value: Fingerprint or name.
        url: Where it is found; empty if the page has no link to it.
    """

    title: str
    value: str
    url: str = ""


def inputs_of(run: Run) -> list[RunInput]:
    """What a run was made from, and its evaluation; what is not recorded is omitted."""
    return [*_inputs(run)]


def _inputs(run: Run) -> Iterator[RunInput]:
    base = RecordedBase.of(run.made_from)
    if base.repo:
        yield RunInput("base model", f"{base.repo}@{base.revision}" if base.revision else base.repo, _on_the_hub(base))
    for title, key in INPUTS.items():
        if value := text(run.made_from, key):
            yield RunInput(title, value)
    if sources := texts(run.made_from, SOURCES):
        yield RunInput("raw data sources", ", ".join(sources))
    for experiment, adapter in texts_by_name(run.made_from, "champions").items():
        yield RunInput(f"champion of {experiment}", adapter)
    if run.evaluation:
        yield RunInput("evaluation", run.evaluation)
    if run.wandb_url:
        yield RunInput("Weights & Biases", run.wandb_url, run.wandb_url)


def _on_the_hub(base: RecordedBase) -> str:
    repo, revision = base.repo or "", base.revision or ""
    is_public = HUB_ID.fullmatch(repo) and not repo.startswith(NOT_ON_THE_HUB) and COMMIT.fullmatch(revision)
    return f"{HUB}/{repo}/tree/{revision}" if is_public else ""
