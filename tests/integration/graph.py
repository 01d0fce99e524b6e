"""The graph in this process: real assets, store, launcher and workers, without a command line around them."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import dagster as dg

from finetune_assets.config.loading import experiment_names
from finetune_assets.resources import deployment

UP_TO_CHAMPION = ("dolly_raw", "cached_base_model", "tokenized_dataset", "lora_adapter", "adapter_evaluation")
UP_TO_CHAMPION += ("champion_adapter",)
"""Assets of a training and its gate, without plan and report."""
PARTITIONED = ("finetune_assets.assets", "finetune_assets.definitions")


@cache
def _definitions(*experiments: str) -> dg.Definitions:
    for name in [name for name in sys.modules if name.startswith(PARTITIONED)]:
        del sys.modules[name]
    return importlib.import_module("finetune_assets.definitions").project_definitions()


def definitions() -> dg.Definitions:
    """The definitions of the project that the environment points to.

    Partitions are the names of its experiments, which are read when the modules are imported; so they are, for others.
    """
    return _definitions(*experiment_names(deployment.configs()))


@dataclass
class Run:
    """A run that has ended.

    Attributes:
        result: Dagster's.
        log: What it logged, a line an event.
    """

    result: dg.ExecuteInProcessResult
    log: str

    @property
    def success(self) -> bool:
        return self.result.success

    def metadata(self, asset: str) -> dict[str, Any]:
        """Values of the metadata of an asset that was materialized."""
        (materialization,) = self.result.asset_materializations_for_node(asset)
        return {name: entry.value for name, entry in materialization.metadata.items()}

    @property
    def materialized(self) -> set[str]:
        events = self.result.get_asset_materialization_events()
        return {event.asset_key.to_user_string() for event in events if event.asset_key}

    @property
    def reused(self) -> set[str]:
        """Assets whose artifact the store had already."""
        return {asset for asset in self.materialized if self.metadata(asset).get("cache_hit")}

    @property
    def failures(self) -> dict[str, str]:
        """What each asset that failed says: the description of its failure, or of its failed check."""
        said = {}
        for event in self.result.all_events:
            if event.is_step_failure:
                error, user = event.step_failure_data.error, event.step_failure_data.user_failure_data
                said[event.step_key or ""] = (user.description if user else None) or (error.message if error else "")
        for check in self.result.get_asset_check_evaluations():
            if not check.passed:
                said[check.asset_key.to_user_string()] = check.description or ""
        return said


@dataclass
class Graph:
    """Runs one after the other on one Dagster instance.

    Attributes:
        instance: In memory, unless another is given.
    """

    instance: dg.DagsterInstance = field(default_factory=dg.DagsterInstance.ephemeral)

    def run(
        self,
        select: str | Sequence[str] = "*",
        partition: str | None = "demo",
        overrides: Sequence[str] = (),
        force: bool = False,
    ) -> Run:
        """Materialize what is selected, as `dagster asset materialize` does."""
        defs = definitions()
        result = dg.materialize(
            [asset for asset in defs.assets or [] if isinstance(asset, dg.AssetsDefinition)],
            instance=self.instance,
            resources=dict(defs.resources or {}),
            selection=select if isinstance(select, str) else [*select],
            partition_key=partition,
            raise_on_error=False,
            run_config={"resources": {"project": {"config": {"overrides": [*overrides], "force": force}}}},
        )
        entries = self.instance.all_logs(result.run_id)
        return Run(result, "\n".join(entry.user_message or entry.message for entry in entries))
