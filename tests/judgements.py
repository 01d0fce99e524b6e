"""Judged rows that tests train on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import ROOT
from raw import ingest

from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.learning import Learning
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

BASE = PACKAGED["demo-base"]
Rows = list[dict[str, Any]]


def sample_rows(count: int) -> Rows:
    """The first rows of the packaged sample."""
    return [json.loads(line) for line in SAMPLE.read_text().splitlines()[:count]]


def pairs(count: int, rejected: str | None = None) -> Rows:
    """Rows of the sample, each with a rejected answer: a text, or by default the answer of a later row."""
    rows = sample_rows(2 * count)
    texts = [(row, rejected or other["response"]) for row, other in zip(rows[:count], rows[count:], strict=True)]
    return [{**row, "chosen": row["response"], "rejected": text} for row, text in texts if text != row["response"]]


def labelled(count: int) -> Rows:
    """Rows of the sample; every second one has the answer of another row, and is labelled bad."""
    rows = sample_rows(2 * count)
    return [
        {**row, "label": True} if number % 2 else {**row, "response": rows[-number - 1]["response"], "label": False}
        for number, row in enumerate(rows[:count])
    ]


def configured(*overrides: str) -> ExperimentConfig:
    settings = ["training.max_steps=3", "lora.dropout=0", "training.precision=fp32", *overrides]
    return load_experiment(ROOT / "configs", "demo", settings).config


def prepared(folder: Path, rows: Rows, config: ExperimentConfig) -> Path:
    """The tokenized dataset of rows."""
    folder.mkdir(parents=True)
    file, out = folder / "rows.jsonl", folder / "dataset"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.mkdir()
    tokenizer = load_tokenizer(str(BASE))
    prepare_dataset(
        ingest(folder / "raw", file), tokenizer, config.data, "salt", out, learning=Learning.of(config.training)
    )
    return out


Prepare = Callable[..., Path]
