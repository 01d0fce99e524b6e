"""Automation conditions: when an experiment's asset is materialized automatically.

Dagster's event-based conditions (`newly_updated` and similar) lose events that occur at the wrong moment, and fire even
if nothing changed. The conditions here compare states instead: the inputs of the last request with the current inputs.
Changes cannot be missed, and a failed materialization is not repeated with the same inputs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import dagster as dg

from finetune_assets.automation import heartbeat
from finetune_assets.automation.settings_hash import retrieval_of_experiments, settings_hashes
from finetune_assets.resources.index_versions import DOCUMENTS_TAG, documents_tag, newest_good_index
from finetune_assets.resources.raw_versions import (
    DATA_VERSION_TAG,
    GOOD_TAG,
    OVERRIDES_TAG,
    PARTITION_TAG,
    TRAINING_VERSION_TAG,
    configured_source,
    newest_good,
    source_tag,
    tag_of_source,
)

PAGE = 1_000
DOLLY_RAW, RETRIEVAL_INDEX, TOKENIZED_DATASET = "dolly_raw", "retrieval_index", "tokenized_dataset"
TRAINING = ("training_plan", "lora_adapter")
"""Assets for which a dataset counts by its version for trainings, if it has one."""
SERVABLE_CHECK = "servable"
"""Check of `training_plan`, which blocks only experiments with `serving` settings."""
Asked = dict[str, str | None]
"""Inputs of a request: the settings hash under `settings`, and each upstream asset's data version under its name."""


class InputsChanged(dg.AutomationCondition):  # type: ignore[type-arg]
    """True for a subscribed experiment if its settings or inputs changed since the last request of the asset.

    An input that was materialized in the same run as this asset does not count as a change, whether that run succeeded
    or not: a failed training is retried with the next version of its inputs, or when the raw data becomes current again
    after another version. Runs with overrides, bad versions of the raw data, and whatever is derived from another
    source than the configured one are ignored.

    Args:
        inputs: Names of the upstream assets to compare by data version.
        always_made: Whether a successful run always materializes the asset, so that a request without a materialization
            has failed.
    """

    def __init__(self, *inputs: str, always_made: bool = True) -> None:
        self.inputs, self.always_made = inputs, always_made

    @property
    def description(self) -> str:
        return "Settings or input versions changed since the last request"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        memory, instance, source = RequestMemory.read(context.cursor), context.asset_graph_view.instance, _source()
        memory.count_requested(_partitions(context.get_previous_requested_subset(context.root_context.key)))
        memory.count_raw(instance, source, context.key)
        for name in {*self.inputs} - {DOLLY_RAW}:
            memory.count_made(name, source, context.key, instance)
        memory.count_own(context.key.to_user_string(), instance)
        hashes = settings_hashes(context.key.to_user_string())
        documents = _documents() if RETRIEVAL_INDEX in self.inputs else {}
        known = _partitions(context.candidate_subset) & hashes.keys()
        memory.seen = {name: memory.inputs_of(name, hashes[name], self.inputs, source, documents) for name in known}
        changed = {name for name, inputs in memory.seen.items() if memory.asked.get(name) != inputs}
        changed |= memory.again & known if self.always_made else set()
        subset = context.candidate_subset.compute_intersection_with_partition_keys(changed)
        heartbeat.beat("experiments_sensor")
        return dg.AutomationResult(context, subset, cursor=memory.write())


def _documents() -> dict[str, str]:
    """The document set of each subscribed experiment that retrieves."""
    return {name: documents_tag(retrieval.documents) for name, retrieval in retrieval_of_experiments().items()}


def _source() -> str:
    return source_tag(configured_source())


@dataclass
class RequestMemory:
    """Cursor of `InputsChanged`: the inputs of the last request and the newest input versions.

    Attributes:
        asked: Inputs of the last request, by experiment.
        seen: Inputs at the last evaluation, by experiment.
        versions: Newest data version, by asset and experiment; of the raw data, the newest good version by source tag.
        read_to: Storage id of the last materialization that was read, by asset.
        arrivals: Number of times that a good version of the raw data replaced another version, by source tag.
        last_raw: Newest version of the raw data, good or bad, by source tag.
        unmade: Experiments whose last request has produced no materialization, with `arrivals` at the request.
    """

    asked: dict[str, Asked] = field(default_factory=dict)
    seen: dict[str, Asked] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    read_to: dict[str, int] = field(default_factory=dict)
    arrivals: int = 0
    last_raw: dict[str, str] = field(default_factory=dict)
    unmade: dict[str, int] = field(default_factory=dict)

    @property
    def again(self) -> Set[str]:
        """Experiments whose request is repeated: it produced nothing, and raw data arrived since."""
        return {name for name, arrivals in self.unmade.items() if arrivals < self.arrivals}

    @staticmethod
    def read(cursor: str | None) -> "RequestMemory":
        """Parse a cursor, also one of an earlier version, which counted the raw data of all sources."""
        stored = json.loads(cursor) if cursor else {}
        memory = RequestMemory(**{"read_to" if name == "read" else name: value for name, value in stored.items()})
        if "" in memory.versions.get(DOLLY_RAW, ()):
            del memory.versions[DOLLY_RAW]
            memory.read_to.pop(DOLLY_RAW, None)
        return memory

    def write(self) -> str:
        return json.dumps(asdict(self))

    def count_requested(self, experiments: Set[str]) -> None:
        """Record the inputs seen at the last evaluation as requested, for the experiments requested then."""
        for name in experiments & self.seen.keys():
            self.asked[name] = self.seen[name]
            self.unmade[name] = self.arrivals

    def count_raw(self, instance: dg.DagsterInstance, source: str, asset: dg.AssetKey) -> None:
        """Read the materializations of `dolly_raw` since the last evaluation."""
        versions = self.versions.setdefault(DOLLY_RAW, {})
        for record, materialization in self._new(instance, DOLLY_RAW):
            tags, tag = materialization.tags or {}, tag_of_source(materialization) or source
            version, last = tags.get(DATA_VERSION_TAG, ""), self.last_raw.get(tag)
            self.last_raw[tag] = version
            if GOOD_TAG not in tags:
                continue
            versions[tag] = version
            self.arrivals += tag == source and last is not None and last != version
            run = _run_of(instance, record.run_id, asset)
            experiment = run.tags.get(PARTITION_TAG, "") if run else ""
            if experiment in self.asked and tag == source:
                self.asked[experiment][DOLLY_RAW] = version

    def count_made(self, upstream: str, source: str, asset: dg.AssetKey, instance: dg.DagsterInstance) -> None:
        """Read the materializations of `upstream` since the last evaluation."""
        versions = self.versions.setdefault(upstream, {})
        together: dict[str, bool] = {}
        for record, materialization in self._new(instance, upstream):
            if OVERRIDES_TAG in (materialization.tags or {}) or tag_of_source(materialization) not in (None, source):
                continue
            tags = materialization.tags or {}
            if upstream == RETRIEVAL_INDEX and GOOD_TAG not in tags:
                continue
            partition = tags.get(DOCUMENTS_TAG) if upstream == RETRIEVAL_INDEX else record.partition_key
            name, version = partition or "", tags.get(DATA_VERSION_TAG, "")
            if asset.to_user_string() in TRAINING:
                version = tags.get(TRAINING_VERSION_TAG, version)
            versions[name] = version
            if upstream == RETRIEVAL_INDEX:
                continue
            if record.run_id not in together:
                together[record.run_id] = _run_of(instance, record.run_id, asset) is not None
            if together[record.run_id] and name in self.asked:
                self.asked[name][upstream] = version

    def count_own(self, asset: str, instance: dg.DagsterInstance) -> None:
        """Read the materializations of the asset itself since the last evaluation."""
        for record, _ in self._new(instance, asset, f"own {asset}"):
            self.unmade.pop(record.partition_key or "", None)

    def inputs_of(
        self, experiment: str, settings: str, upstream: Sequence[str], source: str, documents: Mapping[str, str]
    ) -> Asked:
        """Current inputs of an experiment; `documents` has the document set of each experiment that retrieves."""
        inputs: Asked = {"settings": settings}
        partitions = {DOLLY_RAW: source, RETRIEVAL_INDEX: documents.get(experiment)}
        for name in upstream:
            if (partition := partitions.get(name, experiment)) is not None:
                inputs[name] = self.versions.get(name, {}).get(partition)
        return inputs

    def _new(
        self, instance: dg.DagsterInstance, asset: str, cursor: str = ""
    ) -> Iterator[tuple[dg.EventLogRecord, dg.AssetMaterialization]]:
        cursor = cursor or asset
        for record in _materializations(instance, asset, self.read_to.get(cursor)):
            self.read_to[cursor] = record.storage_id
            if record.asset_materialization:
                yield record, record.asset_materialization


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


def _run_of(instance: dg.DagsterInstance, run_id: str, asset: dg.AssetKey) -> dg.DagsterRun | None:
    """A run, if it also materializes the asset."""
    run = instance.get_run_by_id(run_id)
    return run if run and (not run.asset_selection or asset in run.asset_selection) else None


def _partitions(subset: Any) -> Set[str]:
    return subset.expensively_compute_partition_keys() if subset else set()


class HasGoodData(dg.AutomationCondition):  # type: ignore[type-arg]
    """True while a version of the configured source has passed its blocking checks, and one of the experiment's index.

    A later version that failed them changes nothing: the last good version is still used.

    The base model is also fetched only then, in the run that trains on it. Requested earlier, each experiment's base
    model would require a separate run, and the runs of a hundred experiments would be queued before the first training.
    """

    @property
    def description(self) -> str:
        return "A version of the configured raw data, and of the documents, passed its blocking checks"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        subset, instance = context.candidate_subset, context.asset_graph_view.instance
        if not subset.is_empty and newest_good(instance, configured_source()) is None:
            subset = context.get_empty_subset()
        if not subset.is_empty and (documents := _documents()):
            good = {name for name in {*documents.values()} if newest_good_index(instance, name)}
            waiting = {name for name, wanted in documents.items() if wanted not in good}
            subset = subset.compute_intersection_with_partition_keys(_partitions(subset) - waiting)
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


class TrainsOnEachDataset(dg.AutomationCondition):  # type: ignore[type-arg]
    """True for an experiment whose training follows each new version of its dataset.

    That of an experiment that retrieves does not, unless it has `data.retrieval.retrain`: whether more than its
    documents has changed is known once its dataset is materialized.
    """

    @property
    def description(self) -> str:
        return "The training follows each new version of the dataset"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        subset = context.candidate_subset
        waiting = {name for name, retrieval in retrieval_of_experiments().items() if not retrieval.retrain}
        if not subset.is_empty and waiting:
            subset = subset.compute_intersection_with_partition_keys(_partitions(subset) - waiting)
        return dg.AutomationResult(context, subset)


class WarnsOnly(dg.AutomationCondition):  # type: ignore[type-arg]
    """True for a blocking check whose failure is a warning: `servable` of an experiment without `serving` settings.

    Dagster ignores the severity here: a check that failed with a warning has not passed.
    """

    @property
    def description(self) -> str:
        return "A failure of this check is a warning"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        subset = context.candidate_subset
        if not isinstance(context.key, dg.AssetCheckKey) or context.key.name != SERVABLE_CHECK:
            return dg.AutomationResult(context, context.get_empty_subset())
        unserved = _partitions(subset) - settings_hashes("served_adapter").keys()
        return dg.AutomationResult(context, subset.compute_intersection_with_partition_keys(unserved))


def auto_materialize(
    *inputs: str,
    only_while: dg.AutomationCondition | None = None,  # type: ignore[type-arg]
    apart: Sequence[str] = (),
    always_made: bool = True,
) -> dg.AutomationCondition:  # type: ignore[type-arg]
    """Condition of an asset: inputs changed, or will change in the same run, and its dependencies are ready.

    Dependencies are ready if they exist, are not in progress and have passed their blocking checks. The raw data counts
    as ready if any version of it is good, because an automatic run reads that version, and so does a retrieval index.

    Args:
        inputs: Names of the upstream assets to compare by data version.
        only_while: Additional condition that must hold.
        apart: Names of upstream assets that belong to other experiments; not all of their partitions need to exist.
        always_made: Whether a successful run always materializes the asset.
    """
    condition = dg.AutomationCondition
    counted, others = dg.AssetSelection.assets(*inputs), dg.AssetSelection.assets(*apart)
    unchecked = dg.AssetSelection.assets(*apart, DOLLY_RAW, RETRIEVAL_INDEX)
    dataset, index = dg.AssetSelection.assets(TOKENIZED_DATASET), dg.AssetSelection.assets(RETRIEVAL_INDEX)
    will_change = condition.any_deps_match(condition.will_be_requested())
    asked = InputsChanged(*inputs, always_made=always_made) | will_change.allow(counted - dataset)
    if TOKENIZED_DATASET in inputs:
        asked |= will_change.allow(dataset) & TrainsOnEachDataset()
    checked = condition.check_passed() | condition.will_be_requested() | WarnsOnly()
    ready = (
        ~condition.any_deps_missing().ignore(others | index)  # other experiments may have made it
        & ~condition.any_deps_in_progress().ignore(others)
        & ~condition.in_progress()
        & condition.all_deps_match(condition.all_checks_match(checked, blocking_only=True)).ignore(unchecked)
    )
    both = asked.with_label("Inputs changed") & HasSettings() & ready.with_label("Dependencies ready")
    return (both & only_while if only_while else both).with_label("Auto-materialize")
