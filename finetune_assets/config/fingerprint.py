"""An artifact's identity: a hash over what it is made from, the settings that it reads, and the code that makes it.

Each `*_CODE` names the version of the code that makes an artifact; raise it when that code changes the bytes. Fields
that the schema marks `not_identity` are left out, and so is every comment, order and spelling of a YAML file.
"""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any

from finetune_assets.config.loading import Experiment
from finetune_assets.config.schema import Columns

RAW_CODE = "3"
BASE_MODEL_CODE = "1"
TOKENIZED_CODE = "4"
ADAPTER_CODE = "4"
EVALUATION_CODE = "3"
MERGE_CODE = "1"
STACK_CODE = "2"
PLAN_CODE = "1"


def fingerprint(**parts: Any) -> str:
    """sha256 (64 hex digits) of `parts` in canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def identity(settings: Any) -> Any:
    """A group of settings as plain data, without the fields that cannot change the bytes."""
    if not is_dataclass(settings):
        return settings
    kept = (field for field in fields(settings) if field.metadata.get("identity", True))
    return {field.name: identity(getattr(settings, field.name)) for field in kept}


def raw_fingerprint(columns: Columns, content: Any) -> str:
    """Of the raw data. `content` pins every byte of the source: file hashes in reading order, or a Hub commit."""
    return fingerprint(code=RAW_CODE, columns=identity(columns), content=content)


def base_model_fingerprint(repo: str, revision: str) -> str:
    """Of a cached base model: its repository and commit (content hash, for one without commits)."""
    return fingerprint(code=BASE_MODEL_CODE, repo=repo, revision=revision)


def tokenized_fingerprint(experiment: Experiment, split_salt: str, raw: str, tokenizer_files: dict[str, str]) -> str:
    """Of a tokenized dataset. `tokenizer_files` maps each tokenizer file to its sha256."""
    return fingerprint(
        code=TOKENIZED_CODE,
        data=identity(experiment.config.data),
        split_salt=split_salt,
        raw=raw,
        tokenizer=tokenizer_files,
    )


def adapter_fingerprint(experiment: Experiment, tokenized: str, base_model: str, warm_start: str | None) -> str:
    """Of an adapter. `warm_start` is the fingerprint of the adapter that it begins from, if any."""
    config = experiment.config
    model, training = identity(config.model), identity(config.training)
    for named_by_its_content in ("base_model", "revision"):
        del model[named_by_its_content]
    return fingerprint(
        code=ADAPTER_CODE,
        model=model,
        training={**training, "warm_start": warm_start},
        lora=identity(config.lora),
        tokenized=tokenized,
        base_model=base_model,
    )


def plan_fingerprint(adapter: str) -> str:
    """Of the plan of an adapter's training."""
    return fingerprint(code=PLAN_CODE, adapter=adapter)


def evaluation_fingerprint(
    experiment: Experiment,
    adapter: str,
    champion: str | None = None,
    general_text: str | None = None,
    tasks: str | None = None,
    split: str = "gate",
) -> str:
    """Of an adapter's evaluation; the adapter's own fingerprint names data and base model already.

    Args:
        experiment: Whose settings say what is measured.
        adapter: Fingerprint of the challenger.
        champion: Fingerprint of the adapter that it is compared with, if there is one.
        general_text: Fingerprint of the text by which forgetting is measured.
        tasks: Fingerprint of the folder of `evaluation.lm_eval`, if there is one.
        split: Whose rows they are measured on.
    """
    settings = identity(experiment.config.evaluation)
    del settings["general_text"]  # named by its content, as are tasks of one's own
    if settings["lm_eval"]:
        settings["lm_eval"]["folder"] = tasks
    return fingerprint(
        code=EVALUATION_CODE,
        evaluation=settings,
        adapter=adapter,
        champion=champion,
        general_text=general_text,
        split=split,
    )


def merge_fingerprint(experiment: Experiment, adapter: str) -> str:
    """Of an adapter merged into its base, which the adapter's own fingerprint names."""
    return fingerprint(code=MERGE_CODE, merge=identity(experiment.config.merge), adapter=adapter)


def stack_fingerprint(experiment: Experiment, adapters: list[str], base_model: str) -> str:
    """Of adapters combined into one, named in the order of `stack.adapters`."""
    model = identity(experiment.config.model)
    for named_by_its_content in ("base_model", "revision"):
        del model[named_by_its_content]
    return fingerprint(
        code=STACK_CODE,
        stack=identity(experiment.config.stack),
        seed=experiment.config.training.seed,
        model=model,
        adapters=adapters,
        base_model=base_model,
    )
