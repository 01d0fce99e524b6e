"""When an asset of an experiment is materialized without a human.

Dagster's conditions on events (`newly_updated` and its kin) forget what happens at the wrong moment, and fire although
nothing changed. So what is compared here is what an asset was asked for last with what it would be made from now: a
condition on a state, which cannot be missed, and which does not repeat what failed.
"""

import json
from collections.abc import Iterator, Sequence, Set
from typing import Any

import dagster as dg

from finetune_assets.automation import heartbeat
from finetune_assets.automation.settings_hash import settings_of
from finetune_assets.resources.project import DATA_VERSION_TAG, GOOD_TAG, OVERRIDES_TAG, newest_raw_tags

PAGE = 1_000
Asked = dict[str, str | None]
"""Hash of the settings under `settings`, and the data version of each asset before it under that one's name."""


class InputsChanged(dg.AutomationCondition):  # type: ignore[type-arg]
    """True for a subscribed experiment whose settings or inputs are not those that the asset was last asked for with.

    An input that was made in one run together with this asset is not news, whether that run succeeded or not: a
    training that failed is tried again with the next version of its inputs. Runs with overrides do not count.

    Args:
        inputs: Names of the assets whose data versions count.
    """

    def __init__(self, *inputs: str) -> None:
        self.inputs = inputs

    @property
    def description(self) -> str:
        return "Settings or input versions changed since the last request"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        memory = Memory.read(context.cursor)
        memory.count_requested(_partitions(context.get_previous_requested_subset(context.root_context.key)))
        for name in self.inputs:
            memory.count_made(name, context.key, context.asset_graph_view.instance)
        now = settings_of(context.key.to_user_string())
        known = _partitions(context.candidate_subset)
        memory.seen = {name: memory.inputs_of(name, now[name], self.inputs) for name in now if name in known}
        changed = {name for name, inputs in memory.seen.items() if memory.asked.get(name) != inputs}
        subset = context.candidate_subset.compute_intersection_with_partition_keys(changed)
        heartbeat.beat("experiments_sensor")
        return dg.AutomationResult(context, subset, cursor=memory.write())


class Memory:
    """What an asset was asked for, and the versions of its inputs; kept from one evaluation to the next.

    Attributes:
        asked: By experiment, with what it was last asked for.
        seen: By experiment, what was found at the last evaluation.
        versions: By asset and experiment (empty for an asset without), the data version that was made last.
        read: By asset, up to which record its materializations were read.
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
    def read(cursor: str | None) -> "Memory":
        return Memory(**json.loads(cursor)) if cursor else Memory()

    def write(self) -> str:
        return json.dumps({"asked": self.asked, "seen": self.seen, "versions": self.versions, "read": self.read_to})

    def count_requested(self, experiments: Set[str]) -> None:
        """What was requested at the last evaluation was asked for with what was seen then."""
        for name in experiments & self.seen.keys():
            self.asked[name] = self.seen[name]

    def count_made(self, upstream: str, asset: dg.AssetKey, instance: dg.DagsterInstance) -> None:
        """Read what was materialized of `upstream` since the last evaluation."""
        versions = self.versions.setdefault(upstream, {})
        together: dict[str, bool] = {}
        for record in _materializations(instance, upstream, self.read_to.get(upstream)):
            self.read_to[upstream] = record.storage_id
            made = record.asset_materialization
            if made is None or OVERRIDES_TAG in (made.tags or {}):
                continue
            name, version = record.partition_key or "", (made.tags or {}).get(DATA_VERSION_TAG, "")
            versions[name] = version
            if record.run_id not in together:
                together[record.run_id] = _was_to_make(instance, record.run_id, asset)
            if together[record.run_id] and name in self.asked:
                self.asked[name][upstream] = version

    def inputs_of(self, experiment: str, settings: str, upstream: tuple[str, ...]) -> Asked:
        versions = ((name, self.versions.get(name, {})) for name in upstream)
        return {"settings": settings} | {name: found.get(experiment, found.get("")) for name, found in versions}


def _materializations(instance: dg.DagsterInstance, asset: str, after: int | None) -> Iterator[dg.EventLogRecord]:
    """Oldest first."""
    cursor = None
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), after_storage_id=after)
    while True:
        page = instance.fetch_materializations(wanted, limit=PAGE, cursor=cursor, ascending=True)
        yield from page.records
        if not page.has_more:
            return
        cursor = page.cursor


def _was_to_make(instance: dg.DagsterInstance, run_id: str, asset: dg.AssetKey) -> bool:
    run = instance.get_run_by_id(run_id)
    return run is not None and (not run.asset_selection or asset in run.asset_selection)


def _partitions(subset: Any) -> Set[str]:
    return subset.expensively_compute_partition_keys() if subset else set()


class RawChecksPassed(dg.AutomationCondition):  # type: ignore[type-arg]
    """True while the newest raw data is good: a base model is then fetched in the run that trains on it.

    Asked for before, each experiment's would be a run of its own, and a hundred experiments' runs would stand in the
    queue before the first training.
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
    """True for a subscribed experiment that has what the asset is for: not each is merged, or stacked, or trained."""

    @property
    def description(self) -> str:
        return "The experiment configures this asset"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        subset = context.candidate_subset
        if not subset.is_empty:
            named = settings_of(context.key.to_user_string()).keys()
            subset = subset.compute_intersection_with_partition_keys(named & _partitions(subset))
        return dg.AutomationResult(context, subset)


def auto_materialize(
    *inputs: str,
    only_while: dg.AutomationCondition | None = None,  # type: ignore[type-arg]
    apart: Sequence[str] = (),
) -> dg.AutomationCondition:  # type: ignore[type-arg]
    """The condition of an asset: something changed, or will in the same run, and what is before it is whole and good.

    Args:
        inputs: Names of the assets whose data versions count.
        only_while: What must hold besides.
        apart: Names of assets before it that are of other experiments, of which only some need be there.
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
