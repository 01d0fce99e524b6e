"""The asset `retrieval_index` on real folders: what it publishes and measures, and what its sensor starts."""

import json
import time

import dagster as dg
import pytest
from integration.graph import Graph, Run, definitions
from projects import TestProject
from retrieval.towns import TOWNS, passage, write_rows
from servers.hub import Hub
from servers.s3 import Bucket

from finetune_assets.automation import documents as sensors
from finetune_assets.automation.documents import documents_sensor
from finetune_assets.resources.project import Project
from finetune_assets.resources.raw_versions import GOOD_TAG
from finetune_assets.retrieval.index import open_index
from finetune_assets.store.artifacts import ArtifactRef

INDEX, HUB_NAME = ["retrieval_index"], "datasets/owner/towns"


@pytest.fixture
def graph(project: TestProject) -> Graph:
    return Graph()


@pytest.fixture
def towns(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> TestProject:
    """A project with rows about towns, a document for each town, and the set `towns` of them."""
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(write_rows(project.root / "rows.jsonl")))
    (project.root / "towns").mkdir()
    for town in TOWNS:
        (project.root / "towns" / f"{town}.txt").write_text(passage(town))
    (project.configs / "documents").mkdir(exist_ok=True)
    write(project, "towns", "source: ./towns")
    return project


def write(project: TestProject, name: str, text: str) -> None:
    """Write a document set, and an experiment of the same name that retrieves from it."""
    (project.configs / "documents" / f"{name}.yaml").write_text(text + "\n")
    demo = (project.configs / "experiments" / "demo.yaml").read_text()
    project.write_experiment(name, demo.replace("data:\n", f"data:\n  retrieval: {{documents: {name}}}\n"))


def checks(run: Run) -> dict[str, bool]:
    return {check.check_name: check.passed for check in run.result.get_asset_check_evaluations()}


def is_good(run: Run) -> bool:
    (made,) = run.result.asset_materializations_for_node("retrieval_index")
    return GOOD_TAG in (made.tags or {})


def test_from_documents_to_measurements_and_back_to_the_same_version(towns: TestProject, graph: Graph) -> None:
    alone = graph.run(INDEX, "towns")
    assert alone.success, alone.log
    assert checks(alone)["hit"]
    assert "hit_at_1" not in alone.metadata("retrieval_index"), "no raw data to measure with"
    assert graph.run(["dolly_raw"], None).success
    first = graph.run(INDEX, "towns")
    described = first.metadata("retrieval_index")
    assert described["cache_hit"]
    assert (described["dagster/row_count"], described["documents"]) == (50, 50)
    assert (described["rows_with_golden_passage"], described["rows_without_golden_passage"]) == (100, 0)
    assert described["hit_at_1"] == described["mrr"] == 1
    assert {*checks(first).values()} == {True}
    (name,) = towns.published("indexes")

    (towns.root / "towns" / f"{TOWNS[3]}.txt").unlink()
    (towns.root / "towns" / "empty.md").write_text("\n")
    (towns.root / "towns" / "twice.md").write_text(passage(TOWNS[5]).upper())
    second = graph.run(INDEX, "towns")
    described = second.metadata("retrieval_index")
    assert (described["rows_with_golden_passage"], described["rows_without_golden_passage"]) == (98, 2)
    assert (described["empty_documents"], described["duplicate_documents"]) == (1, 1)
    assert described["dagster/row_count"] == 49
    assert len(towns.published("indexes")) == 2

    (towns.root / "towns" / f"{TOWNS[3]}.txt").write_text(passage(TOWNS[3]))
    for other in ("empty", "twice"):
        (towns.root / "towns" / f"{other}.md").unlink()
    back = graph.run(INDEX, "towns").metadata("retrieval_index")
    assert back["cache_hit"]
    assert name in back["uri"]


def test_checks_that_fail(towns: TestProject, graph: Graph) -> None:
    graph.run(["dolly_raw"], None)
    long = " ".join(f"word{number}" for number in range(60))
    (towns.root / "towns" / "long.txt").write_text(f"{long} one\n\n{long} two")
    write(towns, "towns", "{source: ./towns, checks: {long_words: 50, max_long_share: 0, max_near_duplicate_share: 0}}")
    warned = graph.run(INDEX, "towns")
    assert warned.success
    assert checks(warned) == {"empty": True, "near_duplicates": False, "long_passages": False, "hit": True}
    assert is_good(warned), "warnings block nothing"
    rows = [
        {"instruction": f"Unrelated {number}?", "context": passage(TOWNS[number]), "response": "x"}
        for number in range(40)
    ]
    (towns.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graph.run(["dolly_raw"], None)
    (towns.root / "towns" / "empty.txt").write_text(" ")
    write(towns, "towns", "{source: ./towns, checks: {max_empty_share: 0}}")
    failed = graph.run(INDEX, "towns")
    assert checks(failed) == {"empty": False, "near_duplicates": True, "long_passages": True, "hit": False}
    assert not is_good(failed)


def test_contexts_and_runs_of_experiments(towns: TestProject, graph: Graph) -> None:
    write(towns, "contexts", "{from_contexts: true, passages: {by: document}}")
    missing = graph.run(INDEX, "contexts")
    assert not missing.success, "there are no rows yet"
    contexts = (towns.configs / "experiments" / "contexts.yaml").read_text()
    towns.write_experiment("reads", contexts)
    both = graph.run(["dolly_raw", *INDEX], "reads")
    assert both.success, both.log
    (name,) = towns.published("indexes")
    index = open_index(towns.store.fetch(towns.store.resolve("indexes", name, "retrieval_index")))
    assert {*index.passages.texts} == {passage(town) for town in TOWNS}
    assert graph.run(INDEX, "contexts").metadata("retrieval_index")["cache_hit"]
    nothing = graph.run(INDEX, "demo")
    assert nothing.success
    assert nothing.metadata("retrieval_index") == {"index": "none"}
    assert len(towns.published("indexes")) == 1


class Sensor:
    """Ticks of `documents_sensor`, a minute apart.

    Attributes:
        loaded: Definitions that Dagster has loaded; None for those of now.
        keys: Keys of all runs that were asked for.
    """

    def __init__(self, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instance, self.cursor, self.now = instance, "", time.time()
        self.loaded: dg.Definitions | None = None
        self.keys: list[str] = []
        monkeypatch.setattr(sensors.time, "time", lambda: self.now)

    def starts(self) -> list[str]:
        """Experiments whose document sets three ticks ask for."""
        started = []
        for _ in range(3):
            self.now += 60
            loaded = self.loaded or definitions()
            result = documents_sensor(dg.build_sensor_context(self.instance, self.cursor, definitions=loaded))
            assert isinstance(result, dg.SensorResult)
            self.cursor = result.cursor or ""
            started += [str(request.partition_key) for request in result.run_requests or []]
            self.keys += [str(request.run_key) for request in result.run_requests or []]
        return started


def test_sensor(towns: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    sensor = Sensor(graph.instance, monkeypatch)
    write(towns, "contexts", "from_contexts: true")
    write(towns, "away", "source: ./nowhere")
    assert sensor.starts() == ["towns"], "each set by itself: there are no rows, and a source is away"
    assert sensor.starts() == []
    file = towns.root / "towns" / f"{TOWNS[0]}.txt"
    file.touch()
    assert sensor.starts() == []
    text = file.read_text()
    file.write_text("Changed.")
    assert sensor.starts() == ["towns"]
    file.write_text(text)
    assert sensor.starts() == ["towns"]
    write(towns, "towns", "{source: ./towns, passages: {size: 9, overlap: 1}}")
    assert sensor.starts() == ["towns"]
    graph.run(["dolly_raw"], None)
    assert sensor.starts() == ["contexts"]
    (towns.root / "nowhere").mkdir()
    (towns.root / "nowhere" / "a.md").write_text("# A\nText.")
    assert sensor.starts() == ["away"]


def test_sensor_and_experiments_that_dagster_has_not_loaded_yet(
    towns: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `finetune new` under a running UI: a request for an unknown partition fails the tick of all sets."""
    sensor = Sensor(graph.instance, monkeypatch)
    sensor.loaded = definitions()
    write(towns, "added", "source: ./towns")
    towns.write_experiment("also", (towns.configs / "experiments" / "towns.yaml").read_text())
    assert sensor.starts() == ["towns"], "by an experiment that is loaded, although `also` uses the set too"
    sensor.loaded = None
    assert sensor.starts() == ["added"]
    assert sensor.starts() == []


def test_sensor_and_a_set_that_is_out_of_use_for_a_while(
    towns: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster never runs a key twice, so numbers go on where they were."""
    sensor, file = Sensor(graph.instance, monkeypatch), towns.root / "towns" / f"{TOWNS[0]}.txt"
    text = file.read_text()
    assert sensor.starts() == ["towns"]
    file.write_text("Changed.")
    assert sensor.starts() == ["towns"]
    experiment = towns.configs / "experiments" / "towns.yaml"
    subscribed = experiment.read_text()
    experiment.unlink()
    assert sensor.starts() == []
    file.write_text(text)
    experiment.write_text(subscribed)
    assert sensor.starts() == ["towns"], "back to the first version"
    assert len({*sensor.keys}) == 3


def passages(project: TestProject, run: Run) -> dict[str, str]:
    """Passages of the index of `towns` that a run made, with their sources."""
    assert run.success, run.log
    table = open_index(project.store.fetch(current_index())).passages.table
    return dict(zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True))


def current_index() -> ArtifactRef:
    index = Project().lineage("towns").index()
    assert index
    return index


@pytest.mark.system
def test_documents_of_a_bucket(towns: TestProject, graph: Graph, moto: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(name: str, text: str) -> None:
        moto.put(f"some/prefix/{name}", text.encode())

    write(towns, "towns", f"source: {moto.url}")
    sensor = Sensor(graph.instance, monkeypatch)
    assert sensor.starts() == [], "an empty bucket is not read"
    put("north/alby.md", "# Alby\nAlby sells oil.")
    put("coast.jsonl", json.dumps({"id": "breham", "text": "Breham sells salt."}))
    put("map.png", "no document")
    moto.put("some/prefix-of-another/c.md", b"Not ours.")
    assert sensor.starts() == ["towns"]
    expected = {"Alby sells oil.": "north/alby.md", "Breham sells salt.": "coast.jsonl#breham"}
    assert passages(towns, graph.run(INDEX, "towns")) == expected
    put("north/alby.md", "# Alby\nAlby sells oil.")
    assert sensor.starts() == [], "the same bytes"
    put("north/alby.md", "# Alby\nAlby sells wool.")
    assert sensor.starts() == ["towns"]
    assert "Alby sells wool." in passages(towns, graph.run(INDEX, "towns"))


@pytest.mark.system
def test_documents_of_a_hub_dataset(
    towns: TestProject, graph: Graph, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sensor and index alone ask for the branch: what uses the index reads the same commit, also without a Hub."""
    card = b"# A card is no document"
    hub.add(
        HUB_NAME, {"README.md": card, "alby.md": b"# Alby\nAlby sells oil.", "notes/coast.txt": b"Breham sells salt."}
    )
    write(towns, "towns", f"source: hf://{HUB_NAME}")
    sensor = Sensor(graph.instance, monkeypatch)
    assert sensor.starts() == ["towns"]
    assert passages(towns, graph.run(INDEX, "towns")) == {
        "Alby sells oil.": "alby.md",
        "Breham sells salt.": "notes/coast.txt",
    }
    first = current_index()
    hub.add(
        HUB_NAME, {"README.md": card, "rows.jsonl": json.dumps({"title": "Alby", "text": "It sells wool."}).encode()}
    )
    assert current_index() == first
    assert sensor.starts() == ["towns"]
    assert passages(towns, graph.run(INDEX, "towns")) == {"It sells wool.": "rows.jsonl#1"}
    hub.failing = 503
    assert sensor.starts() == []
    assert current_index() != first
