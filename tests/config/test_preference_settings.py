"""Settings of judged answers: each impossible one is named with its value, and those of `sft` keep their identity."""

import pytest
from paths import ROOT

from finetune_assets.artifacts.kinds import ADAPTERS, TOKENIZED
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_experiment

CONFIGS = ROOT / "configs"
DPO, KTO = "training.objective=dpo", "training.objective=kto"


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["training.objective=ppo"], ["training.objective", "ppo", "dpo"]),
        (["training.preference.beta=0.2"], ["training.preference", "sft"]),
        ([DPO, "training.preference.beta=0"], ["training.preference.beta", "0"]),
        ([DPO, "training.preference.beta=.nan"], ["training.preference.beta", "nan"]),
        ([DPO, "training.preference.label_smoothing=0.5"], ["training.preference.label_smoothing", "0.5"]),
        ([DPO, "training.preference.reference=gpt-4"], ["training.preference.reference", "gpt-4", "champion"]),
        ([DPO, "training.preference.desirable_weight=2"], ["training.preference.desirable_weight", "kto"]),
        ([DPO, "training.preference.instruction_weight=-1"], ["training.preference.instruction_weight", "-1"]),
        ([KTO, "training.preference.undesirable_weight=0"], ["training.preference.undesirable_weight", "0"]),
        ([KTO, "training.preference.length_normalised=true"], ["training.preference.length_normalised", "dpo"]),
        ([KTO, "training.preference.label_smoothing=0.1"], ["training.preference.label_smoothing", "dpo"]),
        ([KTO, "data.tokenization.train_on_inputs=true"], ["data.tokenization.train_on_inputs", "kto"]),
        ([DPO, "data.tokenization.packing_length=200"], ["data.tokenization.packing_length", "200", "192"]),
        ([DPO, "data.retrieval.documents=x"], ["data.retrieval", "dpo"]),
        (["training.warm_start=champion", "lora.init_lora_weights=gaussian"], ["lora.init_lora_weights", "gaussian"]),
        (
            [DPO, "training.preference.reference=champion", "lora.init_lora_weights=pissa"],
            ["lora.init_lora_weights", "pissa"],
        ),
    ],
)
def test_impossible_settings(overrides: list[str], facts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(CONFIGS, "demo", overrides)
    assert all(fact in str(error.value) for fact in facts), str(error.value)


def test_the_objective_is_part_of_the_identity_where_it_changes_bytes() -> None:
    def identities(*overrides: str) -> tuple[str, str]:
        config = load_experiment(CONFIGS, "demo", [*overrides]).config
        dataset = TOKENIZED.fingerprint(config, dolly_raw="r", tokenizer={}, split_salt="s", retrieval_index=None)
        inputs = {"tokenized_dataset": dataset, "cached_base_model": "b", "warm_start": None, "reference": None}
        return dataset, ADAPTERS.fingerprint(config, **inputs)

    sft, dpo, kto = (identities(f"training.objective={name}") for name in ("sft", "dpo", "kto"))
    assert sft == identities()
    assert len({sft[0], dpo[0], kto[0]}) == 3
    stronger = identities(DPO, "training.preference.beta=0.5")
    assert (stronger[0] == dpo[0], stronger[1] == dpo[1]) == (True, False), "the rows are not tokenized again"
    assert identities(DPO, "training.preference.instruction_weight=0")[0] != dpo[0]
