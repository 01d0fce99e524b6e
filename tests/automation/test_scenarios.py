"""What is requested when: the conditions of the real assets, on a graph of the same shape whose steps cost nothing."""

import os
import random
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import pytest
from projects import TestProject

from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.assets.adapter_evaluation import adapter_evaluation
from finetune_assets.assets.cached_base_model import cached_base_model
from finetune_assets.assets.champion_adapter import champion_adapter
from finetune_assets.assets.lora_adapter import lora_adapter
from finetune_assets.assets.merged_model import merged_model
from finetune_assets.assets.served_adapter import served_adapter
from finetune_assets.assets.stacked_adapter import stacked_adapter
from finetune_assets.assets.tokenized_dataset import tokenized_dataset
from finetune_assets.assets.training_plan import training_plan
from finetune_assets.automation.conditions import SERVABLE_CHECK
from finetune_assets.automation.settings_hash import settings_hashes
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.loading import load_experiment
from finetune_assets.resources.index_versions import DOCUMENTS_TAG
from finetune_assets.resources.project import AUTOMATIC_TAG
from finetune_assets.resources.raw_versions import (
    GOOD_TAG,
    OVERRIDES_TAG,
    SOURCE_TAG,
    TRAINING_VERSION_TAG,
    configured_source,
    newest_good,
    source_tag,
)
from finetune_assets.store.artifacts import ArtifactRef

REAL = {
    asset.key.to_user_string(): asset
    for asset in (
        cached_base_model,
        tokenized_dataset,
        training_plan,
        lora_adapter,
        adapter_evaluation,
        champion_adapter,
        merged_model,
        served_adapter,
        stacked_adapter,
    )
}
UPSTREAM = {name: sorted(key.to_user_string() for key in asset.dependency_keys) for name, asset in REAL.items()}
INDEX = "retrieval_index"
ALL = set(REAL) - {"merged_model", "served_adapter", "stacked_adapter"}
"""What an experiment needs that is neither merged, served nor stacked."""
TRAINING = {"training_plan", "lora_adapter", "adapter_evaluation", "champion_adapter"}
OF_OTHERS = {("stacked_adapter", "champion_adapter")}
"""Of which asset all partitions count for another one."""
CHECKED = {"tokenized_dataset", "training_plan"}
"""Assets with a blocking check of each experiment's own."""
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
DATA_VERSION_TAG = "dagster/data_version"
EXPERIMENT = "model: {base_model: demo-base}\nsubscribed: true\n"


@dataclass
class World:
    """A deployment: its files, its Dagster instance, and what its steps would do.

    Attributes:
        configs: Its configuration.
        raw: Version of the raw data that its source holds.
        bases: Version of each experiment's base model on the Hub.
        failing: Assets whose step fails, by experiment.
        failing_checks: Experiments whose dataset fails its blocking check.
        too_large: Experiments whose training does not fit.
        unservable: Experiments whose plan fails the check `servable`, and with which severity.
        raw_is_bad: Whether raw data fails its blocking check.
        source: Source of the runs that are started; the configured one if empty.
        documents: Version of each document set.
        cursor: What the last look remembers for the next one.
        graphs: The definitions of the graph, by the experiments that are its partitions.
    """

    project: TestProject
    instance: dg.DagsterInstance = field(default_factory=dg.DagsterInstance.ephemeral)
    raw: str = ""
    raw_is_bad: bool = False
    source: str = ""
    documents: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    failing: dict[str, set[str]] = field(default_factory=dict)
    failing_checks: set[str] = field(default_factory=set)
    too_large: set[str] = field(default_factory=set)
    unservable: dict[str, dg.AssetCheckSeverity] = field(default_factory=dict)
    cursor: Any = None
    graphs: dict[tuple[str, ...], dg.Definitions] = field(default_factory=dict)

    def copy(self, project: TestProject) -> "World":
        """A world with the same history, for a project with the same configuration."""
        copied = World(project, raw=self.raw, cursor=self.cursor, documents=dict(self.documents))
        for storage in ("run_storage", "event_log_storage"):  # of an ephemeral instance: SQLite in memory
            ours, theirs = (getattr(world.instance, storage)._held_conn.connection for world in (self, copied))
            ours.dbapi_connection.backup(theirs.dbapi_connection)
        return copied

    def experiments(self) -> list[str]:
        return sorted(path.stem for path in (self.project.configs / "experiments").glob("*.yaml"))

    def write(self, name: str, more: str = "", text: str = EXPERIMENT) -> None:
        self.project.write_experiment(name, text + more)

    def graph(self) -> dg.Definitions:
        """The graph, with an experiment for each file of now."""
        experiments = tuple(self.experiments())
        if experiments not in self.graphs:
            partitions = dg.StaticPartitionsDefinition(experiments)
            assets = [self._raw(), self._index(), *(self._like(asset, partitions) for asset in REAL)]
            self.graphs[experiments] = dg.Definitions(assets=assets)
        return self.graphs[experiments]

    def _index(self) -> dg.AssetsDefinition:
        partitions = dg.StaticPartitionsDefinition(self.experiments())

        @dg.asset(name=INDEX, deps=["dolly_raw"], partitions_def=partitions)
        def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:  # type: ignore[type-arg]
            documents = self.set_of(context.partition_key)
            assert documents
            version = self.documents[documents]
            tags = {DOCUMENTS_TAG: documents, **({} if version.endswith("-bad") else {GOOD_TAG: "true"})}
            return dg.MaterializeResult(data_version=dg.DataVersion(version), tags=tags)

        return made

    def new_documents(self, name: str, version: str) -> None:
        self.documents[name] = version
        self.run({INDEX}, next(user for user in self.experiments() if self.set_of(user) == name))

    def _raw(self) -> dg.AssetsDefinition:
        @dg.asset(name="dolly_raw", check_specs=[dg.AssetCheckSpec("good", asset="dolly_raw", blocking=True)])
        def made() -> dg.MaterializeResult:  # type: ignore[type-arg]
            check = dg.AssetCheckResult(check_name="good", passed=not self.raw_is_bad)
            tags = {SOURCE_TAG: self.source_tag, **({} if self.raw_is_bad else {GOOD_TAG: "true"})}
            return dg.MaterializeResult(data_version=dg.DataVersion(self.raw), check_results=[check], tags=tags)

        return made

    def _like(self, name: str, partitions: dg.PartitionsDefinition) -> dg.AssetsDefinition:
        specs = []
        if name in CHECKED:
            named = ["good", SERVABLE_CHECK] if name == "training_plan" else ["good"]
            specs = [dg.AssetCheckSpec(check, asset=name, blocking=True, partitions_def=partitions) for check in named]

        @dg.asset(
            name=name,
            deps=[
                dg.AssetDep(upstream, partition_mapping=dg.AllPartitionMapping())
                if (name, upstream) in OF_OTHERS
                else upstream
                for upstream in UPSTREAM[name]
            ],
            partitions_def=partitions,
            check_specs=specs,
            automation_condition=REAL[name].automation_conditions_by_key[dg.AssetKey(name)],
        )
        def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:  # type: ignore[type-arg]
            experiment = context.partition_key
            if name in self.failing.get(experiment, ()):
                raise dg.Failure("as the test wants it", allow_retries=False)
            bad = self.too_large if name == "training_plan" else self.failing_checks
            results = [dg.AssetCheckResult(check_name="good", passed=experiment not in bad)]
            if name == "training_plan":
                passed, severity = experiment not in self.unservable, self.unservable.get(experiment, ERROR)
                results.append(dg.AssetCheckResult(check_name=SERVABLE_CHECK, passed=passed, severity=severity))
            training = (
                {TRAINING_VERSION_TAG: version} if (version := self.training_version(name, experiment, context)) else {}
            )
            overridden = {OVERRIDES_TAG: "1"} if OVERRIDES_TAG in context.run.tags else {}
            raw = self.raw_of_run(name, context)
            version = self.version_of(name, experiment, raw) + ("-overridden" if overridden else "")
            return dg.MaterializeResult(
                data_version=dg.DataVersion(version),
                check_results=results if specs else [],
                tags={SOURCE_TAG: self.source_tag, **overridden, **training},
                metadata={"raw": raw or ""},
            )

        return made

    def set_of(self, experiment: str) -> str | None:
        """The document set that an experiment retrieves from."""
        retrieval = load_experiment(self.project.configs, experiment).config.data.retrieval
        return retrieval.documents if retrieval else None

    def training_version(self, name: str, experiment: str, context: dg.AssetExecutionContext) -> str | None:
        """Version of a dataset without its index, as the real asset has it."""
        retrieval = load_experiment(self.project.configs, experiment).config.data.retrieval
        if name != "tokenized_dataset" or retrieval is None or retrieval.retrain:
            return None
        settings = settings_hashes(name).get(experiment, "unsubscribed")
        return fingerprint(settings=settings, raw=self.raw_of_run(name, context))[:32]

    @property
    def source_tag(self) -> str:
        return source_tag(self.source or configured_source())

    def raw_of_run(self, name: str, context: dg.AssetExecutionContext) -> str | None:
        """Version of the raw data that a step uses, as in the real graph."""
        if name != "tokenized_dataset":
            return self.trained_on("tokenized_dataset", context.partition_key)
        if AUTOMATIC_TAG not in context.run.tags:
            return self.raw
        record = self.instance.get_run_record_by_id(context.run.run_id)
        assert record
        return newest_good(self.instance, configured_source(), record.create_timestamp.timestamp())

    def version_of(self, name: str, experiment: str, raw: str | None) -> str:
        """What a step makes: a function of settings and inputs, as in the real graph."""
        settings = settings_hashes(name).get(experiment, "unsubscribed")
        if name == "cached_base_model":
            return fingerprint(settings=settings, found=self.bases.get(experiment, ""))
        inputs = [
            raw
            if upstream == "dolly_raw"
            else self.documents.get(self.set_of(experiment) or "")
            if upstream == INDEX
            else self.last(upstream, experiment)
            for upstream in UPSTREAM[name]
        ]
        return fingerprint(settings=settings, inputs=inputs)

    def last(self, name: str, experiment: str) -> str | None:
        materialization = self._newest(name, experiment)
        return materialization.tags[DATA_VERSION_TAG] if materialization else None  # type: ignore[index]

    def trained_on(self, name: str, experiment: str) -> str | None:
        """Version of the raw data from which the experiment's newest artifact is derived."""
        materialization = self._newest(name, experiment)
        return str(materialization.metadata["raw"].value) if materialization else None

    def _newest(self, name: str, experiment: str) -> dg.AssetMaterialization | None:
        partitions = None if name == "dolly_raw" else [experiment]
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(name), asset_partitions=partitions)
        records = self.instance.fetch_materializations(wanted, limit=1).records
        return records[0].asset_materialization if records else None

    def run(self, assets: set[str], experiment: str | None = None, **tags: str) -> bool:
        """Materialize as one run; whether it succeeded."""
        job = self.graph().resolve_implicit_global_asset_job_def()
        selection = [dg.AssetKey(name) for name in sorted(assets)]
        done = job.execute_in_process(
            asset_selection=selection,
            partition_key=experiment,
            instance=self.instance,
            tags=tags,
            raise_on_error=False,
        )
        return done.success

    def new_data(self, version: str, bad: bool = False, source: str = "") -> None:
        self.raw, self.raw_is_bad, self.source = version, bad, source
        self.run({"dolly_raw"})
        self.source = ""

    def look(self) -> dict[str, set[str]]:
        """What one look requests, by experiment."""
        result = dg.evaluate_automation_conditions(self.graph(), self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        found: dict[str, set[str]] = {}
        for name in REAL:
            for experiment in result.get_requested_partitions(dg.AssetKey(name)):
                found.setdefault(str(experiment), set()).add(name)
        return found

    def tick(self) -> dict[str, set[str]]:
        """Look, and run what is requested."""
        requested = self.look()
        for experiment, assets in requested.items():
            self.run(assets, experiment, **{AUTOMATIC_TAG: "true"})
        return requested

    def settle(self) -> list[dict[str, set[str]]]:
        """Ticks until nothing is requested."""
        ticks = []
        while requested := self.tick():
            ticks.append(requested)
            assert len(ticks) < 5, f"it never ends: {ticks}"
        return ticks


def with_three_experiments(project: TestProject) -> TestProject:
    """The project with two subscribed experiments, a and b, and one that is not."""
    for path in (project.configs / "experiments").glob("*.yaml"):
        path.unlink()
    for name in ("a", "b"):
        project.write_experiment(name, EXPERIMENT)
    project.write_experiment("not", EXPERIMENT.replace("true", "false"))
    return project


@pytest.fixture
def world(project: TestProject) -> World:
    """Two subscribed experiments, a and b, and one that is not."""
    return World(with_three_experiments(project))


@pytest.fixture(scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world after its first data, of which each test has a copy."""
    project = with_three_experiments(TestProject.create(tmp_path_factory.mktemp("trained")))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in project.environment.items():
            environment.setenv(name, value)
        world = World(project)
        world.new_data("v1")
        assert world.settle() == [{"a": ALL, "b": ALL}]
    return world


@pytest.fixture
def trained(_trained: World, project: TestProject) -> World:
    """Two subscribed experiments after their first data."""
    return _trained.copy(with_three_experiments(project))


def test_no_data(world: World) -> None:
    """A base model alone would be of no use, and a run of its own for each experiment."""
    assert world.settle() == []


def test_first_data(world: World) -> None:
    world.new_data("v1")
    assert world.settle() == [{"a": ALL, "b": ALL}]


def test_first_data_is_bad(world: World) -> None:
    world.new_data("v1", bad=True)
    assert world.settle() == []
    world.new_data("v2")
    assert world.settle() == [{"a": ALL, "b": ALL}]


@pytest.mark.system
def test_base_model_that_a_person_fetched_before(world: World) -> None:
    world.run({"cached_base_model"}, "a")
    world.new_data("v1")
    assert world.settle() == [{"a": ALL, "b": ALL}]


def test_same_data(trained: World) -> None:
    trained.new_data("v1")
    assert trained.settle() == []


def test_new_data(trained: World) -> None:
    trained.new_data("v2")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]


@pytest.mark.system
def test_back_to_an_earlier_version(trained: World) -> None:
    trained.new_data("v2")
    trained.settle()
    trained.new_data("v1")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]


def test_bad_data_then_good(trained: World) -> None:
    trained.new_data("v2", bad=True)
    assert trained.settle() == []
    trained.new_data("v3")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]


@pytest.mark.system
def test_bad_data_that_is_let_pass_after_all(trained: World) -> None:
    """A threshold was raised, and the same version read again."""
    trained.new_data("v2", bad=True)
    assert trained.settle() == []
    trained.new_data("v2")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]


@pytest.mark.system
def test_check_of_one_experiment_fails_then_all_pass(trained: World) -> None:
    trained.failing_checks = {"a"}
    adapter = trained.last("lora_adapter", "a")
    trained.new_data("v2")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]
    assert trained.last("lora_adapter", "a") == adapter, "trained although its dataset's check failed"
    assert trained.last("lora_adapter", "b") != trained.last("lora_adapter", "a")
    trained.failing_checks = set()
    assert trained.settle() == []
    trained.new_data("v3")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]
    assert trained.last("lora_adapter", "a") != adapter


@pytest.mark.system
def test_a_training_that_does_not_fit_begins_once_a_setting_is_mended(trained: World) -> None:
    trained.too_large = {"a"}
    adapter = trained.last("lora_adapter", "a")
    trained.new_data("v2")
    trained.settle()
    assert trained.last("lora_adapter", "a") == adapter, "trained although it does not fit"
    trained.too_large = set()
    assert trained.settle() == [], "nothing has changed"
    trained.write("a", "training: {gradient_checkpointing: true}")
    assert trained.settle() == [{"a": TRAINING}]
    assert trained.last("lora_adapter", "a") != adapter


@pytest.mark.system
def test_threshold_of_a_failed_check_is_raised(trained: World) -> None:
    trained.failing_checks = {"a"}
    trained.new_data("v2")
    trained.settle()
    adapter = trained.last("lora_adapter", "a")
    trained.failing_checks = set()
    trained.write("a", "data: {max_refused_share: 0.5}")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}}]
    assert trained.last("lora_adapter", "a") != adapter


def test_failed_training_waits_for_new_inputs(trained: World) -> None:
    trained.failing = {"a": {"lora_adapter"}}
    adapter = trained.last("lora_adapter", "a")
    trained.new_data("v2")
    trained.settle()
    trained.failing = {}
    assert trained.settle() == [], "the same inputs were tried again"
    trained.new_data("v3")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]
    assert trained.last("lora_adapter", "a") != adapter


@pytest.mark.system
def test_failed_training_that_a_person_repeats(trained: World) -> None:
    trained.failing = {"a": {"lora_adapter"}}
    trained.new_data("v2")
    trained.settle()
    trained.failing = {}
    trained.run({"lora_adapter"}, "a")
    assert trained.settle() == [{"a": {"adapter_evaluation", "champion_adapter"}}], (
        "what follows a manual run follows by itself"
    )


def test_experiment_is_added(trained: World) -> None:
    trained.write("c")
    assert trained.settle() == [{"c": ALL}]


@pytest.mark.system
def test_experiment_is_removed_and_comes_back(trained: World) -> None:
    path = trained.project.configs / "experiments" / "b.yaml"
    text = path.read_text()
    path.unlink()
    trained.new_data("v2")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}}]
    path.write_text(text)
    assert trained.settle() == [{"b": ALL - {"cached_base_model"}}]


@pytest.mark.system
def test_experiment_is_subscribed_later(trained: World) -> None:
    trained.write("not")
    assert trained.settle() == [{"not": ALL}]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("training: {learning_rate: 1.0e-5}", TRAINING),
        ("lora: {rank: 4}", TRAINING),
        ("hardware: {gpu: H100}", TRAINING),
        ("hardware: {price_per_hour: 2}", set()),
        ("data: {tokenization: {cutoff_len: 100}}", ALL - {"cached_base_model"}),
        ("evaluation: {samples: 1}", {"adapter_evaluation", "champion_adapter"}),
        ("# a comment", set()),
        ("description: words", set()),
        ("training: {logging_steps: 3}", set()),
    ],
)
def test_experiment_is_edited(trained: World, edit: str, expected: set[str]) -> None:
    trained.write("a", edit)
    assert trained.settle() == ([{"a": expected}] if expected else [])


def test_another_base_model(trained: World) -> None:
    trained.write("a", text=EXPERIMENT.replace("demo-base", "./other"))
    assert trained.settle() == [{"a": ALL}]


@pytest.mark.system
def test_base_model_has_moved(trained: World) -> None:
    """Whoever asks the Hub again finds another commit behind the branch."""
    trained.bases = {"a": "moved"}
    trained.run({"cached_base_model"}, "a")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}}]
    trained.run({"cached_base_model"}, "a")
    assert trained.settle() == [], "the same commit again"


@pytest.mark.system
def test_broken_file_stops_itself_alone(trained: World) -> None:
    trained.write("a", "trainig: {}")
    trained.new_data("v2")
    assert trained.settle() == [{"b": ALL - {"cached_base_model"}}]
    trained.write("a")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}}]


def test_override_run_moves_nothing(trained: World) -> None:
    trained.run({"tokenized_dataset", "lora_adapter"}, "a", **{OVERRIDES_TAG: "1"})
    assert trained.settle() == []


def test_manual_run_with_nothing_new_is_left_alone(trained: World) -> None:
    trained.run(ALL, "a")
    assert trained.settle() == []


@pytest.mark.system
def test_data_that_lands_while_training_runs(trained: World) -> None:
    """Two versions in quick succession: what has begun goes on, and the older one is not trained twice."""
    trained.new_data("v2")
    requested = trained.look()
    assert requested.keys() == {"a", "b"}
    trained.new_data("v3")  # after the request, before its run
    for experiment, assets in requested.items():
        trained.run(assets, experiment)
    third = {name: trained.last("lora_adapter", name) for name in ("a", "b")}
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]
    assert {name: trained.last("lora_adapter", name) for name in ("a", "b")} == third


def test_two_versions_between_two_looks(trained: World) -> None:
    trained.new_data("v2")
    trained.new_data("v3")
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}]


def test_upstream_in_progress(trained: World) -> None:
    """While a run that makes an input is going on, nothing is requested on top of it."""
    trained.new_data("v2")
    job = trained.graph().resolve_implicit_global_asset_job_def()
    raw = job.get_subset(asset_selection={dg.AssetKey("dolly_raw")})
    run = trained.instance.create_run_for_job(raw, asset_selection=frozenset({dg.AssetKey("dolly_raw")}))
    _start(trained.instance, run)
    assert trained.look() == {}
    trained.instance.report_run_canceled(run)
    assert trained.settle() == [{"a": ALL - {"cached_base_model"}, "b": ALL - {"cached_base_model"}}], "v2 was good"
    trained.new_data("v2")
    assert trained.settle() == []


def _start(instance: dg.DagsterInstance, run: Any) -> None:
    from dagster import DagsterEvent, DagsterEventType

    planned = DagsterEvent(
        event_type_value=DagsterEventType.RUN_START.value, job_name=run.job_name, message="as the test wants it"
    )
    instance.report_dagster_event(planned, run.run_id)


def test_daemon_that_starts_anew(trained: World) -> None:
    """Without its memory everything is asked for once, and made from nothing new: the store has it all."""
    versions = {name: trained.last(name, "a") for name in REAL}
    trained.cursor = None
    assert trained.settle() == [{"a": ALL, "b": ALL}]
    assert {name: trained.last(name, "a") for name in REAL} == versions


def test_budget_is_used_up(trained: World) -> None:
    """Datasets are made, training waits for tomorrow, and nothing is lost."""
    raw = trained.project.configs / "raw_data.yaml"
    text = raw.read_text()
    raw.write_text(text + "\narrivals: {gpu_hours_a_day: 0}\n")
    trained.new_data("v2")
    assert trained.settle() == [
        {"a": {"tokenized_dataset", "training_plan"}, "b": {"tokenized_dataset", "training_plan"}}
    ]
    raw.write_text(text)
    training = TRAINING - {"training_plan"}
    assert trained.settle() == [{"a": training, "b": training}]


def test_an_unservable_adapter_is_trained_unless_it_is_to_be_served(trained: World) -> None:
    """Also where the training is requested without its plan, as after a day whose budget was used up."""
    raw = trained.project.configs / "raw_data.yaml"
    text = raw.read_text()
    raw.write_text(text + "\narrivals: {gpu_hours_a_day: 0}\n")
    trained.write("b", "serving: {servers: ['folder:./served']}\n")
    trained.unservable = {"a": WARN, "b": ERROR}
    trained.new_data("v2")
    planned = {"tokenized_dataset", "training_plan"}
    assert trained.settle() == [{"a": planned, "b": planned | {"served_adapter"}}]
    raw.write_text(text)
    assert trained.settle() == [{"a": TRAINING - {"training_plan"}}]
    assert trained.trained_on("lora_adapter", "b") == "v1"


def test_a_changed_gate_decides_again_and_measures_nothing(trained: World) -> None:
    trained.write("a", "gate: {min_gain: 0.5}\n")
    assert trained.settle() == [{"a": {"champion_adapter"}}]


@pytest.mark.system
def test_what_an_experiment_is_merged_into_follows_its_champion(trained: World) -> None:
    trained.write("a", "merge: {}\n")
    assert trained.settle() == [{"a": {"merged_model"}}]
    trained.write("a", "merge: {dtype: float32}\n")
    assert trained.settle() == [{"a": {"merged_model"}}]
    trained.new_data("2")
    assert "merged_model" in set().union(*(look.get("a", set()) for look in trained.settle()))


@pytest.mark.system
def test_what_is_served_follows_the_champion_and_the_servers(trained: World) -> None:
    """The first servers also have the check `servable` made again, which blocks from then on."""
    trained.write("a", "serving: {servers: ['folder:./one']}\n")
    assert trained.settle() == [{"a": TRAINING | {"served_adapter"}}]
    trained.write("a", "serving: {servers: ['folder:./one', 'folder:./two']}\n")
    assert trained.settle() == [{"a": {"served_adapter"}}]
    trained.new_data("2")
    assert "served_adapter" in set().union(*(look.get("a", set()) for look in trained.settle()))


@pytest.mark.system
def test_a_stack_is_made_when_the_champions_that_it_names_change(trained: World) -> None:
    adapters = [publish_adapter(trained.project, digit) for digit in "ab"]
    for name in ("one", "two"):
        trained.project.write_experiment(name, "model: {base_model: demo-base}\n")
    trained.write("both", "stack: {adapters: {one: 0.5, two: 0.5}}\n")
    data_alone = {"cached_base_model", "tokenized_dataset"}
    assert trained.settle() == [{"both": data_alone}], "neither has a champion yet"
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        Champions(trained.project.store, name).promote_by_hand(adapter, "a test", "tests")
    assert trained.settle() == [{"both": {"stacked_adapter"}}]
    assert trained.settle() == []
    Champions(trained.project.store, "one").promote_by_hand(adapters[1], "a test", "tests")
    assert trained.settle() == [{"both": {"stacked_adapter"}}]


def publish_adapter(project: TestProject, digit: str) -> ArtifactRef:
    folder = project.root / digit
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(digit)
    return project.store.publish(folder, ADAPTERS.folder, digit * 64, digit * 64, {})


WITHOUT_BASE = ALL - {"cached_base_model"}


def test_bad_data_does_not_cost_the_good_data_before_it_its_training(trained: World) -> None:
    trained.new_data("v2")
    trained.new_data("v3", bad=True)
    assert trained.settle() == [{"a": WITHOUT_BASE, "b": WITHOUT_BASE}]
    assert {trained.trained_on("lora_adapter", name) for name in ("a", "b")} == {"v2"}


@pytest.mark.system
def test_bad_data_that_lands_after_the_request(trained: World) -> None:
    trained.new_data("v2")
    requested = trained.look()
    trained.new_data("v3", bad=True)
    for experiment, assets in requested.items():
        trained.run(assets, experiment, **{AUTOMATIC_TAG: "true"})
    assert {trained.trained_on("lora_adapter", name) for name in ("a", "b")} == {"v2"}
    assert trained.settle() == []


@pytest.mark.system
@pytest.mark.parametrize("between", ["bad", "good"])
def test_a_version_that_is_current_again_is_trained_if_it_was_not(trained: World, between: str) -> None:
    trained.failing = {"a": {"lora_adapter"}}
    trained.new_data("v2")
    trained.settle()
    trained.new_data("v3", bad=between == "bad")
    trained.settle()
    trained.failing = {}
    trained.new_data("v2")
    assert set().union(*(look["a"] for look in trained.settle())) >= TRAINING - {"training_plan"}
    assert {trained.trained_on("lora_adapter", name) for name in ("a", "b")} == {"v2"}


def test_a_version_that_is_current_again_is_left_alone_if_it_was_trained(trained: World) -> None:
    trained.new_data("v2", bad=True)
    trained.new_data("v1")
    assert trained.settle() == []


@pytest.mark.system
def test_other_sources_start_nothing(trained: World) -> None:
    """A run of the demo, or of FINETUNE_RAW_DATA=other, on the same Dagster instance."""
    trained.new_data("x1", source="other")
    assert trained.settle() == []
    trained.source, trained.raw = "other", "x1"
    trained.run({"tokenized_dataset"}, "a")
    trained.source = ""
    assert trained.trained_on("tokenized_dataset", "a") == "x1"
    assert trained.settle() == [], "what a person derives from another source starts nothing"
    trained.new_data("v2")
    assert trained.settle() == [{"a": WITHOUT_BASE, "b": WITHOUT_BASE}]
    assert trained.trained_on("lora_adapter", "a") == "v2"


def test_first_data_of_another_source_starts_nothing(world: World) -> None:
    world.new_data("x1", source="other")
    assert world.settle() == []


@pytest.mark.system
def test_the_configured_source_is_changed_and_changed_back(trained: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_RAW_DATA", "other")
    assert trained.settle() == [], "nothing of it was read yet"
    trained.new_data("x1")
    assert trained.settle() == [{"a": WITHOUT_BASE, "b": WITHOUT_BASE}]
    assert trained.trained_on("lora_adapter", "a") == "x1"
    monkeypatch.delenv("FINETUNE_RAW_DATA")
    assert trained.settle() == [{"a": WITHOUT_BASE, "b": WITHOUT_BASE}]
    assert trained.trained_on("lora_adapter", "a") == "v1"


def test_an_edit_while_the_newest_data_is_bad(trained: World) -> None:
    trained.new_data("v2", bad=True)
    trained.write("a", "data: {tokenization: {cutoff_len: 100}}")
    assert trained.settle() == [{"a": WITHOUT_BASE}]
    assert trained.trained_on("lora_adapter", "a") == "v1"


EVENTS = ("new", "bad", "again", "removed", "foreign", "foreign and bad", "fails", "works", "tick", "tick")


@pytest.mark.system
@pytest.mark.parametrize("seed", range(200 if os.environ.get("SOAK") else 4))
def test_every_order_ends_with_the_newest_good_version(trained: World, seed: int) -> None:
    """Whatever arrives in whatever order, what is trained at last is the newest good version of the source."""
    draw = random.Random(seed)
    good, version = ["v1"], 1
    for _ in range(10):
        event = draw.choice(EVENTS)
        version += 1
        if event == "new":
            good.append(f"v{version}")
            trained.new_data(good[-1])
        elif event == "again":
            trained.new_data(good[-1])
        elif event == "removed":
            good.append(draw.choice(good))
            trained.new_data(good[-1])
        elif event.startswith("foreign"):
            trained.new_data(f"x{version}", bad=event.endswith("bad"), source="other")
        elif event == "bad":
            trained.new_data(f"bad{version}", bad=True)
        elif event == "tick":
            trained.tick()
        else:
            trained.failing = {"a": {"lora_adapter"}} if event == "fails" else {}
    trained.failing = {}
    trained.settle()
    trained.new_data("bad", bad=True)
    trained.new_data(good[-1])  # becomes current again, and is trained if it was not
    trained.settle()
    assert {trained.trained_on("lora_adapter", name) for name in ("a", "b")} == {good[-1]}


def test_an_experiment_of_a_source_that_is_not_configured_is_left_alone(trained: World) -> None:
    trained.write("c", "data: {sources: [elsewhere]}\n")
    assert trained.settle() == []
    trained.write("c", "data: {sources: [sample]}\n")
    assert trained.settle() == [{"c": ALL}]


RETRIEVES = "data: {retrieval: {documents: towns}}\n"
EVALUATED = {"tokenized_dataset", "adapter_evaluation", "champion_adapter"}
"""What a change of the documents alone materializes."""


def with_documents(project: TestProject) -> TestProject:
    """The project with subscribed experiments: a retrieves, b does not, and c retrieves and is trained again."""
    with_three_experiments(project)
    (project.configs / "documents").mkdir(exist_ok=True)
    for name in ("towns", "rivers"):
        (project.configs / "documents" / f"{name}.yaml").write_text("from_contexts: true\n")
    project.write_experiment("a", EXPERIMENT + RETRIEVES)
    project.write_experiment("c", EXPERIMENT + "data: {retrieval: {documents: towns, retrain: true}}\n")
    return project


@pytest.fixture(scope="module")
def _retrieving(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with documents after its first data, of which each test has a copy."""
    project = with_documents(TestProject.create(tmp_path_factory.mktemp("retrieving")))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in project.environment.items():
            environment.setenv(name, value)
        world = World(project)
        world.new_data("v1")
        assert world.settle() == [{"b": ALL}], "without an index, a and c wait for it"
        world.new_documents("towns", "d1")
        assert world.settle() == [{"a": ALL, "c": ALL}]
    return world


@pytest.fixture
def retrieving(_retrieving: World, project: TestProject) -> World:
    """Experiments with documents after their first data."""
    return _retrieving.copy(with_documents(project))


def test_changed_documents_evaluate_the_champion_and_train_nothing(retrieving: World) -> None:
    adapters = {name: retrieving.last("lora_adapter", name) for name in ("a", "b")}
    retrieving.new_documents("towns", "d2")
    assert retrieving.settle() == [{"a": EVALUATED, "c": ALL - {"cached_base_model"}}]
    assert {name: retrieving.last("lora_adapter", name) for name in ("a", "b")} == adapters
    retrieving.new_documents("towns", "d2")
    assert retrieving.settle() == [], "the same documents"


@pytest.mark.system
def test_changed_documents_and_new_data(retrieving: World) -> None:
    """The training waits for the dataset, which shows that more than the documents has changed."""
    retrieving.new_documents("towns", "d2")
    retrieving.new_data("v2")
    whole = ALL - {"cached_base_model"}
    assert retrieving.settle() == [{"a": EVALUATED, "b": whole, "c": whole}, {"a": TRAINING}]
    retrieving.new_data("v3")
    assert retrieving.settle() == [{"a": {"tokenized_dataset"}, "b": whole, "c": whole}, {"a": TRAINING}]
    assert retrieving.trained_on("lora_adapter", "a") == "v3"


@pytest.mark.system
def test_bad_documents_change_nothing(retrieving: World) -> None:
    retrieving.new_documents("towns", "d2-bad")
    assert retrieving.settle() == []
    retrieving.new_documents("towns", "d3")
    assert retrieving.settle() == [{"a": EVALUATED, "c": ALL - {"cached_base_model"}}]


@pytest.mark.system
def test_failed_evaluation_of_changed_documents_waits_for_new_inputs(retrieving: World) -> None:
    retrieving.failing = {"a": {"adapter_evaluation"}}
    retrieving.new_documents("towns", "d2")
    retrieving.settle()
    retrieving.failing = {}
    assert retrieving.settle() == []
    retrieving.new_documents("towns", "d3")
    assert retrieving.settle() == [{"a": EVALUATED, "c": ALL - {"cached_base_model"}}]


@pytest.mark.system
def test_experiment_begins_to_retrieve(retrieving: World) -> None:
    retrieving.write("b", RETRIEVES)
    retrieving.graphs.clear()  # the definitions are reloaded
    assert retrieving.settle() == [{"b": EVALUATED}, {"b": TRAINING}]
