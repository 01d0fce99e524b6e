"""The two or three numbers of a materialization that matter, from its metadata, for the terminal."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune_assets.progress import gigabytes

Metadata = Mapping[str, Any]
EVALUATED = (("loss", "held-out loss", ".3f"), ("exact_match", "exact match", ".1%"), ("rouge_l", "ROUGE-L", ".3f"))
"""Metrics of an evaluation, each with its title and format."""


def findings(asset: str, metadata: Metadata) -> str:
    """What a materialization of an asset has found, in one line; empty for an asset that is not of this project."""
    describe = FINDINGS.get(asset)
    return ", ".join(filter(None, describe(metadata))) if describe else ""


def _raw(metadata: Metadata) -> list[str]:
    quarantined = sum(value for key, value in metadata.items() if key.split(": ")[-1] == "quarantined")
    return [f"{metadata['dagster/row_count']:,} rows", f"{quarantined:,} quarantined"]


def _index(metadata: Metadata) -> list[str]:
    passages = metadata.get("dagster/row_count")
    return [] if passages is None else [f"{passages:,} passages", f"index {metadata['index']}"]


def _base_model(metadata: Metadata) -> list[str]:
    return [f"{metadata['repo']} at {metadata['revision'][:12]}", gigabytes(metadata["bytes"])]


def _dataset(metadata: Metadata) -> list[str]:
    held_out = sum(metadata.get(f"{split}_examples", 0) for split in ("val", "gate"))
    return [
        f"{metadata['train_examples']:,} training examples",
        f"{metadata['tokens']:,} tokens",
        f"{held_out:,} held-out examples",
    ]


def _plan(metadata: Metadata) -> list[str]:
    steps, seconds = (metadata.get(f"predicted_{name}") for name in ("steps", "training_seconds"))
    memory, usable = (metadata.get(name) for name in ("predicted_peak_memory_mib", "usable_memory_mib"))
    return [
        "" if memory is None else f"needs {memory:,.0f} MiB" + (f" of {usable:,.0f} MiB" if usable else ""),
        "" if steps is None else f"{steps:,} steps",
        "" if seconds is None else f"about {seconds / 60:,.1f} minutes",
    ]


def _adapter(metadata: Metadata) -> list[str]:
    if "steps" not in metadata:
        return []
    before, after = (metadata.get(f"held_out_loss_{when}") for when in ("before", "after"))
    return [
        "" if before is None or after is None else f"validation loss {before:.3f} → {after:.3f}",
        f"{metadata['steps']:,} steps",
        f"{metadata['tokens']:,} tokens",
    ]


def _evaluation(metadata: Metadata) -> list[str]:
    scores = [
        f"{title} {metadata[f'{name}_base']:{form}} → {metadata[f'{name}_challenger']:{form}}"
        for name, title, form in EVALUATED
        if f"{name}_base" in metadata and f"{name}_challenger" in metadata
    ]
    forgetting = metadata.get("forgetting")
    return [*scores, "" if forgetting is None else f"forgetting {forgetting:.3f} nats/token"]


def _decision(metadata: Metadata) -> list[str]:
    return [f"champion {metadata['champion']}", metadata["decision"]] if "champion" in metadata else []


def _served(metadata: Metadata) -> list[str]:
    return [f"{metadata['serves']} is served"]


def _report(metadata: Metadata) -> list[str]:
    return [f"experiments: {metadata['experiments']}", f"with a run: {metadata['experiments_with_a_run']}"]


FINDINGS: dict[str, Callable[[Metadata], list[str]]] = {
    "dolly_raw": _raw,
    "retrieval_index": _index,
    "cached_base_model": _base_model,
    "tokenized_dataset": _dataset,
    "training_plan": _plan,
    "lora_adapter": _adapter,
    "adapter_evaluation": _evaluation,
    "champion_adapter": _decision,
    "served_adapter": _served,
    "stacked_adapter": _decision,
    "experiment_report": _report,
}
"""What is found, by asset."""
