"""The asset `retrieval_index` on real folders: what it publishes and measures, and what its sensor starts."""

import json
import time

import dagster as dg
import pytest
from integration.graph import Graph, Run
from projects import TestProject
from retrieval.towns import TOWNS, passage, write_rows

from finetune_assets.automation import documents as sensors
from finetune_assets.automation.documents import documents_sensor
from finetune_assets.resources.raw_versions import GOOD_TAG
from finetune_assets.retrieval.index import open_index

INDEX = ["retrieval_index"]


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
    """Ticks of `documents_sensor`, a minute apart."""

    def __init__(self, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instance, self.cursor, self.now = instance, "", time.time()
        monkeypatch.setattr(sensors.time, "time", lambda: self.now)

    def starts(self) -> list[str]:
        """Document sets that three ticks ask for."""
        started = []
        for _ in range(3):
            self.now += 60
            result = documents_sensor(dg.build_sensor_context(self.instance, self.cursor))
            assert isinstance(result, dg.SensorResult)
            self.cursor = result.cursor or ""
            started += [str(request.partition_key) for request in result.run_requests or []]
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
