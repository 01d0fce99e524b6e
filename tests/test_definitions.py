"""Definitions load light, and hold the graph that was promised."""

import subprocess
import sys

import dagster as dg
import pytest
from paths import ROOT

from finetune_assets.artifacts.kinds import KIND_OF
from finetune_assets.config.loading import experiment_names
from finetune_assets.definitions import project_definitions

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "wandb", "pyarrow")


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
        "retrieval_index": {"dolly_raw"},
        "tokenized_dataset": {"dolly_raw", "cached_base_model", "retrieval_index"},
        "training_plan": {"tokenized_dataset", "cached_base_model"},
        "lora_adapter": {"training_plan", "tokenized_dataset", "cached_base_model"},
        "adapter_evaluation": {"lora_adapter", "tokenized_dataset", "cached_base_model", "retrieval_index"},
        "champion_adapter": {"lora_adapter", "adapter_evaluation"},
        "served_adapter": {"champion_adapter"},
        "merged_model": {"champion_adapter", "tokenized_dataset"},
        "experiment_report": {"adapter_evaluation"},
        "stacked_adapter": {"champion_adapter", "tokenized_dataset", "cached_base_model"},
    }


PARTITIONED = ["cached_base_model", "tokenized_dataset", "training_plan", "lora_adapter"]
PARTITIONED += ["adapter_evaluation", "champion_adapter", "served_adapter", "merged_model", "stacked_adapter"]


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


def test_every_asset_has_an_owner_its_kind_and_a_link_to_its_code() -> None:
    for asset in project_definitions().assets or []:
        assert isinstance(asset, dg.AssetsDefinition)
        (key,) = asset.keys
        kind = KIND_OF[key.to_user_string()]
        assert asset.owners_by_key[key] == ["team:finetune"]
        assert asset.tags_by_key[key]["finetune/kind"] == kind.folder
        assert asset.code_versions_by_key[key] == kind.code_version
        (reference,) = asset.metadata_by_key[key]["dagster/code_references"].code_references
        assert reference.file_path == str(ROOT / "finetune_assets" / "assets" / f"{key.to_user_string()}.py")


@pytest.mark.parametrize(
    ("job", "assets"),
    [
        ("prepare_data", {"dolly_raw", "cached_base_model", "tokenized_dataset"}),
        ("train_and_evaluate", {"training_plan", "lora_adapter", "adapter_evaluation", "champion_adapter"}),
    ],
)
def test_jobs(job: str, assets: set[str]) -> None:
    resolved = project_definitions().resolve_job_def(job)
    assert {key.to_user_string() for key in resolved.asset_layer.executable_asset_keys} == assets
    assert resolved.partitions_def is not None
