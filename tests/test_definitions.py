"""Definitions load light, and hold the graph that was promised."""

import subprocess
import sys

import dagster as dg
import pytest
from paths import ROOT

from finetune_assets.config.loading import experiment_names
from finetune_assets.definitions import project_definitions

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "wandb")


def test_loading_imports_nothing_heavy() -> None:
    code = f"import finetune_assets.definitions, sys; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_graph() -> None:
    graph = project_definitions().resolve_asset_graph()
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "dolly_raw": set(),
        "cached_base_model": set(),
        "tokenized_dataset": {"dolly_raw", "cached_base_model"},
        "training_plan": {"tokenized_dataset", "cached_base_model"},
        "lora_adapter": {"training_plan", "tokenized_dataset", "cached_base_model"},
        "adapter_evaluation": {"lora_adapter", "tokenized_dataset", "cached_base_model"},
        "champion_adapter": {"lora_adapter", "adapter_evaluation"},
        "merged_model": {"champion_adapter", "tokenized_dataset"},
        "experiment_report": {"adapter_evaluation"},
        "stacked_adapter": {"champion_adapter", "tokenized_dataset", "cached_base_model"},
    }


PARTITIONED = ["cached_base_model", "tokenized_dataset", "training_plan", "lora_adapter"]
PARTITIONED += ["adapter_evaluation", "champion_adapter", "merged_model", "stacked_adapter"]


@pytest.mark.parametrize("key", PARTITIONED)
def test_one_partition_an_experiment(key: str) -> None:
    asset = project_definitions().resolve_asset_graph().get(dg.AssetKey(key))
    assert asset.partitions_def is not None
    assert sorted(asset.partitions_def.get_partition_keys()) == experiment_names(ROOT / "configs")


def test_every_asset_explains_itself() -> None:
    graph = project_definitions().resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        assert len(graph.get(key).description or "") > 60
        assert graph.get(key).group_name == "finetune"
