"""What changes an artifact's identity, and what does not."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from paths import ROOT

from finetune_assets.artifacts.kinds import ADAPTERS, EVALUATIONS, TOKENIZED
from finetune_assets.config.data_schema import Retrieval
from finetune_assets.config.fields import ADDED, added
from finetune_assets.config.fingerprint import identity
from finetune_assets.config.loading import Experiment, load_experiment

CONFIGS = ROOT / "configs"


DATASET = {"dolly_raw": "raw", "tokenizer": {"tokenizer.json": "sha"}, "split_salt": "salt", "retrieval_index": None}
MEASURED = {"champion": None, "general_text": None, "tasks": None, "split": "gate", "retrieval_index": None}


def adapter_of(experiment: Experiment, dataset: str, base: str, begun: str | None) -> str:
    return ADAPTERS.fingerprint(
        experiment.config, tokenized_dataset=dataset, cached_base_model=base, warm_start=begun, reference=None
    )


def fingerprints(experiment: Experiment) -> tuple[str, str, str]:
    tokenized = TOKENIZED.fingerprint(experiment.config, **DATASET)
    adapter = adapter_of(experiment, tokenized, "base", None)
    return tokenized, adapter, EVALUATIONS.fingerprint(experiment.config, lora_adapter=adapter, **MEASURED)


def changed(*overrides: str) -> list[bool]:
    before = fingerprints(load_experiment(CONFIGS, "demo"))
    after = fingerprints(load_experiment(CONFIGS, "demo", overrides))
    return [old != new for old, new in zip(before, after, strict=True)]


@pytest.mark.parametrize(
    ("override", "tokenized", "adapter", "evaluation"),
    [
        ("training.learning_rate=5e-4", False, True, True),
        ("lora.rank=4", False, True, True),
        ("model.quantization=nf4", False, True, True),
        ("data.tokenization.cutoff_len=100", True, True, True),
        ("data.num_samples=10", True, True, True),
        ("evaluation.samples=3", False, False, True),
        ("training.logging_steps=1", False, False, False),
        ("training.eval_steps=5", False, True, True),  # the best step is published
        ("training.keep=last", False, False, False),
        ("training.save_steps=5", False, False, False),
        ("training.processes_per_node=2", False, False, False),
        ("data.processes=2", False, False, False),
        ("launcher={engine: slurm, nodes: 2, time_limit: '1:00:00'}", False, False, False),
        ("wandb.project=mine", False, False, False),
        ("subscribed=false", False, False, False),
        ("description=other", False, False, False),
        ("data.prompt_template.description=other", False, False, False),
        # what is said twice the same
        ("training.learning_rate=0.001", False, False, False),
    ],
)
def test_each_setting_changes_what_reads_it(override: str, tokenized: bool, adapter: bool, evaluation: bool) -> None:
    assert changed(override) == [tokenized, adapter, evaluation]


def test_comments_and_key_order_change_nothing(tmp_path: Path) -> None:
    configs = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
    experiments = configs / "experiments"
    (experiments / "a.yaml").write_text("model: {base_model: demo-base}\ntraining: {seed: 1, epochs: 2}\n")
    (experiments / "b.yaml").write_text(
        "# a comment\ntraining:\n  epochs: 2.0 # another\n  seed: 0x1\nmodel:\n  base_model: demo-base\n"
    )
    assert fingerprints(load_experiment(configs, "a")) == fingerprints(load_experiment(configs, "b"))


def test_an_index_changes_what_is_retrieved_from_it() -> None:
    """Dataset, evaluation and thus the adapter of an experiment that retrieves, and nothing of another."""
    for retrieval, differs in (None, False), (Retrieval("towns"), True):
        config = load_experiment(CONFIGS, "demo").config
        config.data.retrieval = retrieval
        datasets = {TOKENIZED.fingerprint(config, **{**DATASET, "retrieval_index": index}) for index in ("a", "b")}
        evaluations = {
            EVALUATIONS.fingerprint(config, lora_adapter="same", **{**MEASURED, "retrieval_index": index})
            for index in ("a", "b")
        }
        assert (len(datasets) == 2, len(evaluations) == 2) == (differs, differs)


@pytest.mark.parametrize("change", [{"split_salt": "other"}, {"dolly_raw": "other"}, {"tokenizer": {"a": "b"}}])
def test_each_input_changes_the_dataset(change: dict[str, object]) -> None:
    config = load_experiment(CONFIGS, "demo").config
    assert TOKENIZED.fingerprint(config, **{**DATASET, **change}) != TOKENIZED.fingerprint(config, **DATASET)


def test_an_input_that_is_missing_or_unknown_is_an_error() -> None:
    config = load_experiment(CONFIGS, "demo").config
    for inputs in ({"dolly_raw": "raw"}, {**DATASET, "more": 1}):
        with pytest.raises(TypeError, match="tokenized"):
            TOKENIZED.fingerprint(config, **inputs)


def test_base_and_warm_start_change_the_adapter() -> None:
    experiment = load_experiment(CONFIGS, "demo")
    made = {adapter_of(experiment, "data", base, begun) for base in ("a", "b") for begun in (None, "x", "y")}
    assert len(made) == 6


def test_base_model_name_counts_by_its_content() -> None:
    """Two names of one commit are one model."""
    one = load_experiment(CONFIGS, "demo", ["model.revision=main"])
    other = load_experiment(CONFIGS, "demo", ["model.revision=v1"])
    assert adapter_of(one, "data", "base", None) == adapter_of(other, "data", "base", None)


@dataclass
class Later:
    """Settings of a later version, which added two."""

    kept: int = 1
    by_default: int | None = added(None)
    several: list[int] = field(default_factory=list, metadata=ADDED)


def test_a_setting_that_was_added_later_counts_once_it_is_set() -> None:
    assert identity(Later()) == {"kept": 1}
    assert identity(Later(by_default=2, several=[3])) == {"kept": 1, "by_default": 2, "several": [3]}
