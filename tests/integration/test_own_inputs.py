"""What assets of users get: artifacts of the store as inputs, and their own outputs by Dagster's IO manager."""

from collections.abc import Mapping

import dagster as dg
import pytest
from integration.graph import Graph, definitions
from projects import TestProject

from finetune_assets.config.loading import experiment_names, load_experiment
from finetune_assets.store.artifacts import ArtifactRef

MODELS = dg.AssetKey("cached_base_model")


def run(assets: list[dg.AssetsDefinition], *selected: dg.AssetsDefinition) -> dg.ExecuteInProcessResult:
    defs = definitions()
    upstream = [asset for asset in defs.assets or [] if isinstance(asset, dg.AssetsDefinition) and MODELS in asset.keys]
    resources = dict(defs.resources or {})
    return dg.materialize([*upstream, *assets], selection=[*selected], resources=resources, raise_on_error=False)


@pytest.mark.parametrize("missing_allowed", [True, False])
def test_an_input_without_a_partition_is_the_artifacts_of_all_experiments(
    project: TestProject, missing_allowed: bool
) -> None:
    assert Graph().run("cached_base_model", partition="demo").success

    @dg.asset(ins={"models": dg.AssetIn(MODELS, metadata={"allow_missing_partitions": missing_allowed})})
    def named(models: Mapping[str, ArtifactRef]) -> dict[str, str]:
        return {experiment: ref.name for experiment, ref in models.items()}

    @dg.asset
    def experiments(named: dict[str, str]) -> list[str]:
        return [*named]

    ended = run([named, experiments], named, experiments)
    if missing_allowed:
        names = ended.output_for_node("named")
        bases = {
            name: load_experiment(project.configs, name).config.model.base_model
            for name in experiment_names(project.configs)
        }
        assert {*names} == {name for name, base in bases.items() if base == bases["demo"]} != {*bases}
        assert len({*names.values()}) == 1
        assert {*ended.output_for_node("experiments")} == {*names}, "Dagster keeps what assets of users return"
    else:
        (failure,) = [event.step_failure_data for event in ended.all_node_events if event.is_step_failure]
        assert failure.error is not None
        assert "cached_base_model" in failure.error.to_string()
