"""The identity of every shipped experiment's artifacts stays what it was: else all of them would be made again.

The golden file has the identities before the code versions of raw data and tokenized datasets were raised. Where the
content is still the same, artifacts keep these identities (see `artifacts/aliases.py`).
"""

import json
from pathlib import Path

from projects import all_configs

from finetune_assets.artifacts.kinds import ADAPTERS, BASE_MODELS, EVALUATIONS, MERGED, PLANS, RAW, STACKS, TOKENIZED
from finetune_assets.config.loading import experiment_names, load_experiment, load_raw_data_config

GOLDEN = Path(__file__).with_name("golden_fingerprints.json")
"""Changed by hand where a code version is raised or settings of a shipped experiment change, and for nothing else."""
ROWS, TOKENIZER, TEXT, TASKS = ({"rows.jsonl": "a" * 64}, {"tokenizer.json": "b" * 64}, "c" * 64, "d" * 64)
COMMIT, OTHER_ADAPTER, INDEX = "e" * 40, "f" * 64, "9" * 64


def fingerprints(configs: Path, name: str) -> dict[str, str]:
    """Of an experiment's artifacts from inputs whose contents are pinned here."""
    experiment, raw_config = load_experiment(configs, name), load_raw_data_config(configs)
    config = experiment.config
    *_, raw = RAW.earlier_fingerprints(raw_config, content=ROWS)
    base_model = BASE_MODELS.fingerprint(None, repo=config.model.base_model, revision=COMMIT)
    index = INDEX if config.data.retrieval else None
    inputs = {
        **{"dolly_raw": raw, "tokenizer": TOKENIZER, "split_salt": raw_config.split_salt},
        "retrieval_index": index,
    }
    (tokenized,) = TOKENIZED.earlier_fingerprints(config, **inputs)

    def adapter(begun: str | None) -> str:
        return ADAPTERS.fingerprint(
            config, tokenized_dataset=tokenized, cached_base_model=base_model, warm_start=begun, reference=None
        )

    def evaluation(champion: str | None = None, tasks: str | None = None, split: str = "gate") -> str:
        given = {"champion": champion, "general_text": TEXT, "tasks": tasks, "split": split, "retrieval_index": index}
        return EVALUATIONS.fingerprint(config, lora_adapter=adapter(None), **given)

    merged = load_experiment(configs, name, ["merge.dtype=bfloat16"]).config
    stack = "stack={adapters: {llama-7b-int8: 0.5, demo: 0.5}, method: svd}"
    stacked = load_experiment(configs, "demo", [stack]).config
    champions = [adapter(None), OTHER_ADAPTER]
    return {
        "dolly_raw": raw,
        "cached_base_model": base_model,
        "tokenized_dataset": tokenized,
        "training_plan": PLANS.fingerprint(config, lora_adapter=adapter(None)),
        "lora_adapter": adapter(None),
        "lora_adapter, from another": adapter(OTHER_ADAPTER),
        "adapter_evaluation": evaluation(),
        "adapter_evaluation, with a champion": evaluation(OTHER_ADAPTER, TASKS),
        "adapter_evaluation, of a sweep": evaluation(split="val"),
        "merged_model": MERGED.fingerprint(merged, champion_adapter=adapter(None)),
        "stacked_adapter": STACKS.fingerprint(stacked, champions=champions, cached_base_model=base_model),
    }


def test_fingerprints_of_what_is_shipped_are_those_of_the_golden_file(tmp_path: Path) -> None:
    golden, configs = json.loads(GOLDEN.read_text()), all_configs(tmp_path)
    assert {name: fingerprints(configs, name) for name in experiment_names(configs)} == golden
