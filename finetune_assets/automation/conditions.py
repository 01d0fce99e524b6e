"""Automation conditions: when an experiment's asset is materialized automatically.

Dagster's event-based conditions (`newly_updated` and similar) lose events that occur at the wrong moment, and fire even
if nothing changed. The conditions here compare states instead: the inputs of the last request with the current inputs.
Changes cannot be missed, and a failed materialization is not repeated with the same inputs.
"""

import json
from collections.abc import Iterator, Sequence, Set
from typing import Any

import dagster as dg

from finetune_assets.automation import heartbeat
from finetune_assets.automation.settings_hash import settings_hashes
from finetune_assets.resources.project import DATA_VERSION_TAG, GOOD_TAG, OVERRIDES_TAG, newest_raw_tags

PAGE = 1_000
Asked = dict[str, str | None]
"""Inputs of a request: the settings hash under `settings`, and each upstream asset's data version under its name."""


class InputsChanged(dg.AutomationCondition):  # type: ignore[type-arg]
    """True for a subscribed experiment if its settings or inputs changed since the last request of the asset.

    An input that was materialized in the same run as this asset does not count as a change, whether that run succeeded
    or not: a failed training is retried with the next version of its inputs. Runs with overrides are ignored.

    Args:
        inputs: Names of the upstream assets to compare by data version.
    """

    def __init__(self, *inputs: str) -> None:
        self.inputs = inputs

    @property
    def description(self) -> str:
        return "Settings or input versions changed since the last request"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        memory = RequestMemory.read(context.cursor)
        memory.count_requested(_partitions(context.get_previous_requested_subset(context.root_context.key)))
        for name in self.inputs:
            memory.count_made(name, context.key, context.asset_graph_view.instance)
        hashes = settings_hashes(context.key.to_user_string())
        known = _partitions(context.candidate_subset)
        memory.seen = {name: memory.inputs_of(name, hashes[name], self.inputs) for name in hashes if name in known}
        changed = {name for name, inputs in memory.seen.items() if memory.asked.get(name) != inputs}
        subset = context.candidate_subset.compute_intersection_with_partition_keys(changed)
        heartbeat.beat("experiments_sensor")
        return dg.AutomationResult(context, subset, cursor=memory.write())


class RequestMemory:
    """Cursor of `InputsChanged`: the inputs of the last request and the newest input versions.

    Attributes:
        asked: Inputs of the last request, by experiment.
        seen: Inputs at the last evaluation, by experiment.
        versions: Newest data version, by asset and experiment (empty string for an asset without partitions).
        read_to: Storage id of the last materialization that was read, by asset.
    """

    def __init__(
        self,
        asked: dict[str, Asked] | None = None,
        seen: dict[str, Asked] | None = None,
        versions: dict[str, dict[str, str]] | None = None,
        read: dict[str, int] | None = None,
    ) -> None:
        self.asked, self.seen, self.versions, self.read_to = asked or {}, seen or {}, versions or {}, read or {}

    @staticmethod
    def read(cursor: str | None) -> "RequestMemory":
        return RequestMemory(**json.loads(cursor)) if cursor else RequestMemory()

    def write(self) -> str:
        return json.dumps({"asked": self.asked, "seen": self.seen, "versions": self.versions, "read": self.read_to})

    def count_requested(self, experiments: Set[str]) -> None:
        """Record the inputs seen at the last evaluation as requested, for the experiments requested then."""
        for name in experiments & self.seen.keys():
            self.asked[name] = self.seen[name]

    def count_made(self, upstream: str, asset: dg.AssetKey, instance: dg.DagsterInstance) -> None:
        """Read the materializations of `upstream` since the last evaluation."""
        versions = self.versions.setdefault(upstream, {})
        together: dict[str, bool] = {}
        for record in _materializations(instance, upstream, self.read_to.get(upstream)):
            self.read_to[upstream] = record.storage_id
            materialization = record.asset_materialization
            if materialization is None or OVERRIDES_TAG in (materialization.tags or {}):
                continue
            name, version = record.partition_key or "", (materialization.tags or {}).get(DATA_VERSION_TAG, "")
            versions[name] = version
            if record.run_id not in together:
                together[record.run_id] = _run_selects(instance, record.run_id, asset)
            if together[record.run_id] and name in self.asked:
                self.asked[name][upstream] = version

    def inputs_of(self, experiment: str, settings: str, upstream: tuple[str, ...]) -> Asked:
        versions = ((name, self.versions.get(name, {})) for name in upstream)
        return {"settings": settings} | {
            name: by_experiment.get(experiment, by_experiment.get("")) for name, by_experiment in versions
        }


def _materializations(instance: dg.DagsterInstance, asset: str, after: int | None) -> Iterator[dg.EventLogRecord]:
    """Materializations after a storage id, oldest first."""
    cursor = None
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), after_storage_id=after)
    while True:
        page = instance.fetch_materializations(wanted, limit=PAGE, cursor=cursor, ascending=True)
        yield from page.records
        if not page.has_more:
            return
        cursor = page.cursor


def _run_selects(instance: dg.DagsterInstance, run_id: str, asset: dg.AssetKey) -> bool:
    run = instance.get_run_by_id(run_id)
    return run is not None and (not run.asset_selection or asset in run.asset_selection)


def _partitions(subset: Any) -> Set[str]:
    return subset.expensively_compute_partition_keys() if subset else set()


class RawChecksPassed(dg.AutomationCondition):  # type: ignore[type-arg]
    """True while the newest raw data has passed its blocking checks.

    The base model is then fetched in the run that trains on it. Requested earlier, each experiment's base model would
    require a separate run, and the runs of a hundred experiments would be queued before the first training.
    """

    @property
    def description(self) -> str:
        return "The latest raw data passed its blocking checks"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        subset = context.candidate_subset
        if not subset.is_empty and GOOD_TAG not in newest_raw_tags(context.asset_graph_view.instance):
            subset = context.get_empty_subset()
        return dg.AutomationResult(context, subset)


class HasSettings(dg.AutomationCondition):  # type: ignore[type-arg]
    """True for a subscribed experiment that configures the asset: not each experiment is merged, stacked or trained."""

    @property
    def description(self) -> str:
        return "The experiment configures this asset"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        subset = context.candidate_subset
        if not subset.is_empty:
            configured = settings_hashes(context.key.to_user_string()).keys()
            subset = subset.compute_intersection_with_partition_keys(configured & _partitions(subset))
        return dg.AutomationResult(context, subset)


def auto_materialize(
    *inputs: str,
    only_while: dg.AutomationCondition | None = None,  # type: ignore[type-arg]
    apart: Sequence[str] = (),
) -> dg.AutomationCondition:  # type: ignore[type-arg]
    """Condition of an asset: inputs changed, or will change in the same run, and its dependencies are ready.

    Dependencies are ready if they exist, are not in progress and have passed their blocking checks.

    Args:
        inputs: Names of the upstream assets to compare by data version.
        only_while: Additional condition that must hold.
        apart: Names of upstream assets that belong to other experiments; not all of their partitions need to exist.
    """
    condition = dg.AutomationCondition
    counted, others = dg.AssetSelection.assets(*inputs), dg.AssetSelection.assets(*apart)
    asked = InputsChanged(*inputs) | condition.any_deps_match(condition.will_be_requested()).allow(counted)
    ready = (
        ~condition.any_deps_missing().ignore(others)
        & ~condition.any_deps_in_progress().ignore(others)
        & ~condition.in_progress()
        & condition.all_deps_blocking_checks_passed().ignore(others)
    )
    both = asked.with_label("Inputs changed") & HasSettings() & ready.with_label("Dependencies ready")
    return (both & only_while if only_while else both).with_label("Auto-materialize")
