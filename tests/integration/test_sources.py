"""Several sources of raw data in one deployment: versions, checks, and experiments that use some of them."""

import json
from pathlib import Path

import dagster as dg
import pytest
from integration.graph import UP_TO_CHAMPION, Graph
from projects import SHORT, TestProject

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.streams import earlier_versions
from finetune_assets.resources.project import Project
from finetune_assets.resources.raw_versions import configured_source, newest_good, requested_version

QUICK = """
model: {base_model: demo-base, dtype: float32}
data:
  tokenization: {cutoff_len: 192}
  val_fraction: 0.2
  checks: {max_truncated_share: 1.0, max_overlap_share: 1.0}
"""


def write_rows(folder: Path, name: str, numbers: range, words: str) -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps(
            {"instruction": f"What is {words} number {n}?", "response": f"It is {words} {n * n}.", "category": words}
        )
        for n in numbers
    ]
    (folder / name).write_text("\n".join(lines))


@pytest.fixture
def sources(project: TestProject) -> tuple[Path, Path]:
    one, two = project.root / "one", project.root / "two"
    write_rows(one, "a.jsonl", range(60), "apple")
    write_rows(two, "a.jsonl", range(100, 160), "pear")
    configure(project)
    project.write_experiment("both", QUICK)
    project.write_experiment("ones", QUICK + "  sources: [one]\n")
    return one, two


def configure(project: TestProject, more_one: str = "", more_two: str = "") -> None:
    (project.configs / "raw_data.yaml").write_text(
        f"sources:\n  one: {{source: ./one, license: MIT{more_one}}}\n  two: {{source: ./two{more_two}}}\n"
        "checks: {max_near_duplicate_share: 1.0}\n"
    )


def test_experiments_use_all_sources_or_those_that_they_name(project: TestProject, sources: tuple[Path, Path]) -> None:
    graph = Graph()
    raw = graph.run("dolly_raw", partition=None)
    assert raw.metadata("dolly_raw")["dagster/row_count"] == 120
    assert raw.metadata("dolly_raw")["one: quarantined"] == 0
    both = graph.run(["cached_base_model", "tokenized_dataset"], "both").metadata("tokenized_dataset")
    ones = graph.run(["cached_base_model", "tokenized_dataset"], "ones").metadata("tokenized_dataset")
    assert both["dagster/row_count"] == 120
    assert ones["dagster/row_count"] == 60
    name = Project().lineage("ones").selected_sources()["one"].fingerprint

    write_rows(sources[1], "b.jsonl", range(200, 210), "plum")
    graph.run("dolly_raw", partition=None)
    again = graph.run(["tokenized_dataset"], "ones")
    assert again.reused == {"tokenized_dataset"}, "its source is the same"
    assert Project().lineage("ones").selected_sources()["one"].fingerprint == name
    assert graph.run(["tokenized_dataset"], "both").metadata("tokenized_dataset")["dagster/row_count"] == 130


@pytest.mark.system
def test_a_single_source_by_name_is_the_same_data(project: TestProject, sources: tuple[Path, Path]) -> None:
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    graph.run(["cached_base_model", "tokenized_dataset"], "ones")
    (project.configs / "raw_data.yaml").write_text("source: ./one\n")
    graph.run("dolly_raw", partition=None)
    assert graph.run("tokenized_dataset", "both").reused == {"tokenized_dataset"}


def test_a_source_that_is_away_stops_only_what_needs_it(project: TestProject, sources: tuple[Path, Path]) -> None:
    one, two = sources
    two.rename(two.with_name("away"))
    graph = Graph()
    raw = graph.run("dolly_raw", partition=None)
    assert raw.success
    assert "two" in raw.log
    assert raw.metadata("dolly_raw")["dagster/row_count"] == 60
    assert graph.run(["cached_base_model", "tokenized_dataset"], "ones").success
    failed = graph.run(["cached_base_model", "tokenized_dataset"], "both")
    assert "'two'" in failed.failures["tokenized_dataset"]

    two.with_name("away").rename(two)
    graph.run("dolly_raw", partition=None)
    two.rename(two.with_name("away"))
    write_rows(one, "b.jsonl", range(60, 70), "apple")
    later = graph.run("dolly_raw", partition=None)
    assert later.metadata("dolly_raw")["dagster/row_count"] == 130, "the last good version of what is away"
    assert graph.run("tokenized_dataset", "both").metadata("tokenized_dataset")["dagster/row_count"] == 130


def test_checks_are_of_each_source(project: TestProject, sources: tuple[Path, Path]) -> None:
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    (sources[1] / "bad.jsonl").write_text("{}\n" * 30)
    failed = graph.run("dolly_raw", partition=None)
    (check,) = [one for one in failed.result.get_asset_check_evaluations() if one.check_name == "quarantine"]
    assert not check.passed
    assert check.metadata["two: rows"].value == 30
    assert check.metadata["one: rows"].value == 0
    (sources[1] / "bad.jsonl").unlink()
    (sources[0] / "a.jsonl").write_text((sources[0] / "a.jsonl").read_text().partition("\n")[0])
    fallen = graph.run("dolly_raw", partition=None)
    (check,) = [one for one in fallen.result.get_asset_check_evaluations() if one.check_name == "row_count"]
    assert check.metadata["one: row_drop_fraction"].value > 0.9
    assert check.metadata["two: row_drop_fraction"].value == 0


@pytest.mark.system
def test_a_bad_version_of_a_source_holds_back_no_other(project: TestProject, sources: tuple[Path, Path]) -> None:
    """Its last good version stays in use, the run fails, and automation continues with what is good."""
    one, two = sources
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    first = Project().raw().current_parts()
    (two / "bad.jsonl").write_text("{}\n" * 30)
    write_rows(one, "b.jsonl", range(60, 70), "apple")
    bad = graph.run("dolly_raw", partition=None)
    assert not bad.success
    (check,) = [each for each in bad.result.get_asset_check_evaluations() if each.check_name == "quarantine"]
    assert first["two"][:12] in (check.description or "")
    metadata = bad.metadata("dolly_raw")
    assert metadata["dagster/row_count"] == 130
    assert metadata["one: quarantined"] == metadata["two: quarantined"] == 0
    assert "not_available" not in metadata, "the sensor would wait for it to be available"
    parts = Project().raw().current_parts()
    assert parts["two"] == first["two"]
    assert parts["one"] != first["one"]
    assert newest_good(graph.instance, configured_source()) == Project().raw().fingerprint
    both = graph.run(["cached_base_model", "tokenized_dataset"], "both")
    assert both.metadata("tokenized_dataset")["dagster/row_count"] == 130

    (two / "bad.jsonl").unlink()
    write_rows(two, "b.jsonl", range(160, 170), "pear")
    assert graph.run("dolly_raw", partition=None).success
    assert graph.run("tokenized_dataset", "both").metadata("tokenized_dataset")["dagster/row_count"] == 140


def test_a_source_without_a_good_version_is_left_out(project: TestProject, sources: tuple[Path, Path]) -> None:
    (sources[1] / "bad.jsonl").write_text("{}\n" * 30)
    graph = Graph()
    raw = graph.run("dolly_raw", partition=None)
    assert not raw.success
    assert raw.metadata("dolly_raw")["dagster/row_count"] == 60
    assert newest_good(graph.instance, configured_source()) == Project().raw().fingerprint
    assert graph.run(["cached_base_model", "tokenized_dataset"], "ones").success
    failed = graph.run(["cached_base_model", "tokenized_dataset"], "both")
    assert "'two'" in failed.failures["tokenized_dataset"]
    (sources[0] / "bad.jsonl").write_text("{}\n" * 30)
    (sources[0] / "a.jsonl").unlink()
    none = graph.run("dolly_raw", partition=None)
    assert not none.success
    assert none.metadata("dolly_raw")["dagster/row_count"] == 60, "the last good version of the other one"


def test_no_version_is_good_if_no_source_is(project: TestProject, sources: tuple[Path, Path]) -> None:
    for source in sources:
        (source / "bad.jsonl").write_text("{}\n" * 30)
    graph = Graph()
    raw = graph.run("dolly_raw", partition=None)
    assert not raw.success
    assert raw.metadata("dolly_raw")["dagster/row_count"] == 120
    assert newest_good(graph.instance, configured_source()) is None


def test_weights_are_shares_of_the_training_tokens(project: TestProject, sources: tuple[Path, Path]) -> None:
    configure(project, ", weight: 0.8", ", weight: 0.2")
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    metadata = graph.run(["cached_base_model", "tokenized_dataset"], "both").metadata("tokenized_dataset")
    shares = {name: part["token_share"] for name, part in metadata["sources"].items()}
    assert shares == pytest.approx({"one": 0.8, "two": 0.2}, abs=0.02)
    assert metadata["sources"]["two"]["left_out_rows"] > 20
    assert metadata["sources"]["one"]["left_out_rows"] == 0
    configure(project, ", max_rows: 30")
    capped = graph.run(["tokenized_dataset"], "both").metadata("tokenized_dataset")
    assert capped["dagster/row_count"] == 90


@pytest.mark.system
def test_rows_of_earlier_versions_are_replayed(project: TestProject, sources: tuple[Path, Path]) -> None:
    one, _ = sources
    project.write_experiment("ones", QUICK + "  sources: [one]\n  replay: 0.2\n")
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    first = graph.run(["cached_base_model", "tokenized_dataset"], "ones").metadata("tokenized_dataset")
    assert first["replayed_rows"] == 0
    (one / "a.jsonl").unlink()
    write_rows(one, "b.jsonl", range(500, 560), "cherry")
    graph.run("dolly_raw", partition=None)
    lineage = Project().lineage("ones")
    (ref,) = lineage.selected_sources().values()
    assert len(earlier_versions(project.store, "one", ref.fingerprint)) == 1
    second = graph.run(["tokenized_dataset"], "ones").metadata("tokenized_dataset")
    assert second["replayed_rows"] > 3
    assert second["replayed_tokens"] / second["tokens"] == pytest.approx(0.2, abs=0.03)


@pytest.mark.system
def test_losses_are_by_source(project: TestProject, sources: tuple[Path, Path]) -> None:
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    graph.run(
        ["cached_base_model", "tokenized_dataset", "lora_adapter", "adapter_evaluation"],
        "both",
        [*SHORT, "data.gate_fraction=0.3"],
    )
    lineage = Project(overrides=[*SHORT, "data.gate_fraction=0.3"]).lineage("both")
    evaluation = json.loads((project.store.fetch(lineage.evaluation()) / "evaluation.json").read_text())
    assert {row["source"] for row in evaluation["sources"]} == {"one", "two"}
    assert all(row["base"] is not None for row in evaluation["sources"])


@pytest.mark.system
def test_the_gate_refuses_an_adapter_of_another_source(
    project: TestProject, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On gate rows of its own, an adapter of other data would win without being better at the champion's task."""
    project.write_experiment("mine", QUICK.replace("val_fraction", "gate_fraction: 0.3\n  val_fraction"))
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./one")
    graph = Graph()
    assert graph.run(UP_TO_CHAMPION, "mine", SHORT).success
    lineage = Project(overrides=[*SHORT]).lineage("mine")
    champion = lineage.expected(ADAPTERS)
    lineage.champions.promote_by_hand(champion, "a test", "tests")
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./two")
    run = graph.run(UP_TO_CHAMPION, "mine", SHORT)
    checks = run.result.get_asset_check_evaluations()
    (check,) = [
        one for one in checks if (one.asset_key.to_user_string(), one.check_name) == ("champion_adapter", "gate")
    ]
    assert not check.passed
    assert "two" in check.description
    assert "one" in check.description
    assert lineage.champions.champion() == champion
    lineage = Project(overrides=[*SHORT]).lineage("mine")
    assert lineage.sources_of(lineage.expected(ADAPTERS)) == {"two"}
    assert lineage.sources_of(champion) == {"one"}


@pytest.mark.system
def test_a_version_that_was_reverted_does_not_come_back_in_an_outage(
    project: TestProject, sources: tuple[Path, Path]
) -> None:
    _, two = sources
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    first = Project().raw().current_parts()["two"]
    write_rows(two, "b.jsonl", range(200, 220), "wrong")
    graph.run("dolly_raw", partition=None)
    (two / "b.jsonl").unlink()
    graph.run("dolly_raw", partition=None)
    two.rename(two.with_name("away"))
    assert Project().raw().current_parts()["two"] == first


@pytest.mark.system
def test_a_source_may_have_any_name(project: TestProject, sources: tuple[Path, Path]) -> None:
    """Also that of a statistic."""
    settings = project.configs / "raw_data.yaml"
    settings.write_text(settings.read_text().replace("  one:", "  rows:"))
    graph = Graph()
    assert graph.run("dolly_raw", partition=None).success
    write_rows(sources[0], "b.jsonl", range(70, 80), "apple")
    assert graph.run("dolly_raw", partition=None).success


def test_sources_of_one_location_have_histories_of_their_own(project: TestProject, sources: tuple[Path, Path]) -> None:
    swapped = "columns: {instruction: response, response: instruction}"
    settings = f"sources: {{one: {{source: ./one}}, other: {{source: ./one, {swapped}}}}}"
    (project.configs / "raw_data.yaml").write_text(settings)
    project.write_experiment("other", QUICK + "  sources: [other]\n  replay: 0.3\n")
    Graph().run("dolly_raw", partition=None)
    lineage = Project().lineage("other")
    assert lineage.replayed(lineage.selected_sources()) == []
    parts = lineage.raw.current_parts()
    sources[0].rename(sources[0].with_name("away"))
    assert Project().raw().current_parts() == parts


@pytest.mark.system
def test_a_cached_dataset_is_trained_with_the_version_that_its_run_read(
    project: TestProject, sources: tuple[Path, Path]
) -> None:
    """The dataset was made of a single source, of which the name is new since."""
    graph = Graph()
    project.write_experiment("ones", QUICK)
    (project.configs / "raw_data.yaml").write_text("source: ./one")
    graph.run("dolly_raw", partition=None)
    assert graph.run(["cached_base_model", "tokenized_dataset"], "ones").success
    project.write_experiment("ones", QUICK + "  sources: [one]\n")
    configure(project)
    graph.run("dolly_raw", partition=None)
    assert graph.run("tokenized_dataset", "ones").reused == {"tokenized_dataset"}
    selected = frozenset({dg.AssetKey("lora_adapter")})
    run = dg.DagsterRun(job_name="automatic", tags={"dagster/partition": "ones"}, asset_selection=selected)
    version = requested_version(graph.instance, run, configured_source(), project.store)
    assert version == Project().raw().fingerprint


def test_a_broken_link_is_no_outage(project: TestProject, sources: tuple[Path, Path]) -> None:
    graph = Graph()
    graph.run("dolly_raw", partition=None)
    (sources[1] / "c.jsonl").symlink_to("/nowhere/c.jsonl")
    assert not graph.run("dolly_raw", partition=None).success
