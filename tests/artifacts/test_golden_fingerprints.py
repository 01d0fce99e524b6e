"""The identity of every shipped experiment's artifacts stays what it was: else all of them would be made again."""

import json
from pathlib import Path

from paths import ROOT

from finetune_assets.config.fingerprint import (
    adapter_fingerprint,
    base_model_fingerprint,
    evaluation_fingerprint,
    merge_fingerprint,
    plan_fingerprint,
    raw_fingerprint,
    stack_fingerprint,
    tokenized_fingerprint,
)
from finetune_assets.config.loading import experiment_names, load_experiment, load_raw_data_config

CONFIGS = ROOT / "configs"
GOLDEN = Path(__file__).with_name("golden_fingerprints.json")
"""Changed by hand where a code version is raised, which is the only reason to change it."""
ROWS, TOKENIZER, TEXT, TASKS = ({"rows.jsonl": "a" * 64}, {"tokenizer.json": "b" * 64}, "c" * 64, "d" * 64)
COMMIT, OTHER_ADAPTER = "e" * 40, "f" * 64


def fingerprints(name: str) -> dict[str, str]:
    """Of an experiment's artifacts from inputs whose contents are pinned here."""
    experiment, raw_config = load_experiment(CONFIGS, name), load_raw_data_config(CONFIGS)
    raw = raw_fingerprint(raw_config.columns, ROWS)
    base_model = base_model_fingerprint(experiment.config.model.base_model, COMMIT)
    tokenized = tokenized_fingerprint(experiment, raw_config.split_salt, raw, TOKENIZER)
    adapter = adapter_fingerprint(experiment, tokenized, base_model, None)
    merged = load_experiment(CONFIGS, name, ["merge.dtype=bfloat16"])
    stacked = load_experiment(CONFIGS, "demo", ["stack={adapters: {llama-7b-int8: 0.5, demo: 0.5}, method: svd}"])
    return {
        "dolly_raw": raw,
        "cached_base_model": base_model,
        "tokenized_dataset": tokenized,
        "training_plan": plan_fingerprint(adapter),
        "lora_adapter": adapter,
        "lora_adapter, from another": adapter_fingerprint(experiment, tokenized, base_model, OTHER_ADAPTER),
        "adapter_evaluation": evaluation_fingerprint(experiment, adapter, None, TEXT),
        "adapter_evaluation, with a champion": evaluation_fingerprint(experiment, adapter, OTHER_ADAPTER, TEXT, TASKS),
        "adapter_evaluation, of a sweep": evaluation_fingerprint(experiment, adapter, None, TEXT, split="val"),
        "merged_model": merge_fingerprint(merged, adapter),
        "stacked_adapter": stack_fingerprint(stacked, [adapter, OTHER_ADAPTER], base_model),
    }


def test_fingerprints_of_what_is_shipped_are_those_of_the_golden_file() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert {name: fingerprints(name) for name in experiment_names(CONFIGS)} == golden
