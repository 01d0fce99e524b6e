"""Judgements of the demo's world: the answers of a model that are wrong, beside the right ones."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.rows import Row
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.generation import answers
from finetune_assets.evaluation.metrics.exact_match import exact_match
from finetune_assets.evaluation.rows import rendered
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE


def sample_rows() -> list[Row]:
    """The packaged rows."""
    return [
        {"context": "", "messages": None, **json.loads(line)}
        for line in SAMPLE.read_text(encoding="utf-8").splitlines()
    ]


def mistakes(
    config: ExperimentConfig, rows: Sequence[Row], adapter: Path | None = None, served_name: str | None = None
) -> list[dict[str, Any]]:
    """Pairs of the right answer and the one that the packaged model gives, of the rows that it answers wrongly.

    Args:
        config: Settings of the prompt.
        rows: The rows.
        adapter: Folder of the adapter that answers; None for the base model.
        served_name: Name of the adapter in the pairs.
    """
    contender = Contender("base", PACKAGED["demo-base"], config, adapter)
    tokenizer = contender.tokenizer()
    prompts = rendered(rows, tokenizer, config.data).prompts
    with LoadedModels(torch.device("cpu")).loaded(contender) as model:
        given = answers(model, tokenizer, prompts, config.evaluation.max_new_tokens)
    return [
        {
            **{key: row[key] for key in ("instruction", "context", "category")},
            "chosen": row["response"],
            "rejected": answer or "",
            **({"adapter": served_name} if served_name else {}),
        }
        for row, answer in zip(rows, given, strict=True)
        if answer and not exact_match(answer, row["response"])
    ]


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
