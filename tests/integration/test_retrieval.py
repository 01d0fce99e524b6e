"""An experiment with retrieval, from raw rows to a promotion, and what a change of its documents re-runs."""

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml
from integration.graph import Graph, Run
from projects import TestProject
from retrieval.towns import REFUSAL, TEMPLATE, TOWNS, passage, write_rows

from finetune_assets.artifacts.champions import Champions, Record
from finetune_assets.artifacts.kinds import RETENTION
from finetune_assets.config.schema import StoreConfig
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.files import gain_of, read_evaluation
from finetune_assets.reporting.collect import collect
from finetune_assets.reporting.pages import experiment_pages
from finetune_assets.resources.project import Project
from finetune_assets.retrieval.asking import RetrievalFormat
from finetune_assets.serving.gate_rows import gate_rows
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.store.gc import inventory, plan

MODES = {"closed_book", "golden", "golden_and_distractors", "retrieved"}
UPSTREAM = ("dolly_raw", "cached_base_model")
EXPERIMENT = ("tokenized_dataset", "training_plan", "lora_adapter", "adapter_evaluation", "champion_adapter")
SETTINGS: dict[str, Any] = {
    "model": {"base_model": "demo-base", "dtype": "float32"},
    "data": {
        "val_fraction": 0.1,
        "gate_fraction": 0.4,
        "near_duplicate_threshold": None,
        "prompt_template": {
            "prompt_input": TEMPLATE.prompt_input,
            "prompt_no_input": TEMPLATE.prompt_no_input,
            "response_split": TEMPLATE.response_split,
        },
        "tokenization": {"cutoff_len": 192},
    },
    "training": {
        **{"max_steps": 12, "macro_batch_size": 8, "micro_batch_size": 8, "learning_rate": 2e-3, "precision": "fp32"},
    },
    "evaluation": {"generated_rows": 8, "max_new_tokens": 12, "general_tokens": 200, "general_text": "demo-prose"},
    "gate": {"max_forgetting": 5.0, "min_rows": 10},
}
RETRIEVAL = {
    **{"documents": "towns", "passages": 2, "golden_share": 0.7, "cite": True},
    **{"without_golden": "refuse", "refusal": REFUSAL},
}


@pytest.fixture
def towns(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> TestProject:
    """A project with rows and documents about towns, one of which has no document, and a champion without passages."""
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(write_rows(project.root / "rows.jsonl")))
    (project.root / "towns").mkdir()
    for town in TOWNS[1:]:
        (project.root / "towns" / f"{town}.txt").write_text(passage(town))
    (project.configs / "documents").mkdir(exist_ok=True)
    (project.configs / "documents" / "towns.yaml").write_text("source: ./towns\n")
    project.write_experiment("towns", yaml.safe_dump(SETTINGS))
    return project


def run(graph: Graph, *assets: str, partition: str | None = "towns") -> Run:
    done = graph.run(assets, partition)
    assert done.success, done.log
    return done


def evaluation_of(project: TestProject, name: str) -> Path:
    return project.store.fetch(project.store.resolve("evaluations", name, "adapter_evaluation"))


def made_from(project: TestProject, kind: str, name: str) -> Mapping[str, Any]:
    manifest = project.store.manifest(kind, name)
    assert manifest
    return manifest.made_from


def collected(project: TestProject, kind: str) -> set[str]:
    """Names of the artifacts of a kind that garbage collection removes once all are old, if it keeps the newest one."""
    few, later = StoreConfig(keep_raw=1, keep_adapters=1, keep_indexes=1), datetime.now(UTC) + timedelta(days=30)
    removals = plan(inventory(project.store.objects), project.namespace, few, RETENTION, later)
    prefixes = [removal.prefix.split("/") for removal in removals if removal.whole]
    return {name for _, folder, name in prefixes if folder == kind}


class ServedRow(NamedTuple):
    """A gate row as servers are asked it: as tokens, and as messages."""

    ids: list[int]
    messages: tuple[tuple[str, str], ...] | None


def rows_of_servers(record: Record) -> list[ServedRow]:
    lineage = Project().lineage("towns")
    rows = gate_rows(lineage, lineage.champions.adapter(record), record.evaluation, count=8, longest=192)
    assert len(rows.ids) == 8
    asked = [turns and tuple((turn["role"], turn["content"]) for turn in turns) for turns in rows.messages]
    return [*map(ServedRow, rows.ids, asked)]


def asks_as_trained(row: ServedRow, adapter: Path) -> bool:
    """Whether the messages have passages, and the adapter's chat template renders them as the row's tokens."""
    assert row.messages
    assert row.messages[0][0] == "context"
    assert row.messages[0][1].startswith("[1] ")
    messages = [{"role": role, "content": content} for role, content in row.messages]
    tokenizer = load_tokenizer(str(adapter))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return bool(row.ids[: len(prompt)] == [*prompt])


@pytest.mark.system
def test_from_rows_to_a_promotion_and_again_for_changed_documents(towns: TestProject, graph: Graph) -> None:
    champion = promoted_without_passages(towns, graph)
    before = {*towns.published("evaluations")}
    write_settings(towns)
    never_used = index_twice(towns, graph)
    trained = run(graph, *EXPERIMENT)
    unknown = unknown_golden_rows(trained)
    (name,) = {*towns.published("evaluations")} - before
    folder = evaluation_of(towns, name)
    modes_are_measured(folder, trained, unknown["gate"])

    record = Champions(towns.store, "towns").current()
    assert record
    assert (record.against, record.numbers["mode"]) == (champion.adapter, "retrieved")
    assert record.numbers["mean"] == pytest.approx(gain_of(folder, 0.95, "retrieved")[0].mean)
    adapter = towns.store.fetch(towns.store.resolve("adapters", record.adapter, "lora_adapter"))
    (index,) = {*towns.published("indexes")} - {never_used}
    assert RetrievalFormat.read(adapter) == RetrievalFormat("towns", index, 2, cite=True, refusal=REFUSAL)
    assert all(asks_as_trained(row, adapter) for row in rows_of_servers(record))
    the_gate_compares_another_mode(towns, graph, folder)

    documents_change_and_the_index_is_dense(towns)
    assert run(graph, "retrieval_index").metadata("retrieval_index")["index"] == "dense"
    again = run(graph, "tokenized_dataset", "adapter_evaluation")
    assert len(towns.published("adapters")) == 2, "none is trained"
    assert again.metadata("tokenized_dataset")["gate_unknown_golden_rows"] == 0
    assert len(towns.published("evaluations")) == 3
    assert {made_from(towns, "evaluations", name)["lora_adapter"] for name in towns.published("evaluations")} == {
        champion.adapter,
        record.adapter,
    }, "the champion is measured again"
    the_report_shows_modes(towns)

    assert len(towns.published("indexes")) == 3
    assert collected(towns, "indexes") == {never_used}
    assert all(asks_as_trained(row, adapter) for row in rows_of_servers(record)), "with the index of the evaluation"
    shutil.rmtree(towns.store_root / towns.namespace / "indexes" / index)
    assert {row.messages for row in rows_of_servers(record)} == {None}


def promoted_without_passages(towns: TestProject, graph: Graph) -> Record:
    run(graph, "dolly_raw", partition=None)
    run(graph, "cached_base_model", *EXPERIMENT)
    (without,) = towns.published("evaluations")
    assert "modes" not in read_evaluation(evaluation_of(towns, without)), "no passages, no modes"
    champion = Champions(towns.store, "towns").current()
    assert champion, "what is compared next was trained without passages"
    return champion


def write_settings(towns: TestProject, **gate: object) -> None:
    """Settings with passages, and with some of the gate."""
    data, gate = {**SETTINGS["data"], "retrieval": RETRIEVAL}, {**SETTINGS["gate"], **gate}
    towns.write_experiment("towns", yaml.safe_dump({**SETTINGS, "data": data, "gate": gate}))


def index_twice(towns: TestProject, graph: Graph) -> str:
    """Make an index that nothing is made with, and then that of the documents; return the name of the first."""
    unused = towns.root / "towns" / "unused.txt"
    unused.write_text("A document of a version that nothing is made with.")
    run(graph, "retrieval_index")
    (never_used,) = towns.published("indexes")
    unused.unlink()
    run(graph, "retrieval_index")
    return never_used


def unknown_golden_rows(trained: Run) -> dict[str, int]:
    """Rows of each split whose golden passage is in no document."""
    dataset = trained.metadata("tokenized_dataset")
    assert dataset["train_golden_rows"] > dataset["train_without_golden_rows"] > 0
    unknown = {split: dataset[f"{split}_unknown_golden_rows"] for split in ("train", "val", "gate")}
    assert sum(unknown.values()) == 2, "the two questions about the town without a document"
    assert REFUSAL.split()[0] in dataset["preview"] or "[1]" in dataset["preview"]
    return unknown


def modes_are_measured(folder: Path, trained: Run, unknown: int) -> None:
    """In the evaluation, row by row, and in the run's metadata."""
    evaluation, measured = read_evaluation(folder), trained.metadata("adapter_evaluation")
    assert evaluation["modes"].keys() == evaluation["unseen_passages"].keys() == MODES
    for mode, result in evaluation["modes"].items():
        assert result["contenders"].keys() == {"base", "champion", "challenger"}
        for metrics in result["contenders"].values():
            assert {"loss", "exact_match", "token_f1", "rouge_l"} <= metrics.keys()
            assert ("citations" in metrics) == (mode != "closed_book")
    serving = evaluation["modes"]["retrieved"]["contenders"]["challenger"]
    assert serving.items() <= evaluation["contenders"]["challenger"].items(), "and in the places of other evaluations"
    losses = {mode: result["contenders"]["challenger"]["loss"] for mode, result in evaluation["modes"].items()}
    assert losses["golden"] < losses["closed_book"], "it reads"
    assert 0 < evaluation["unseen_passages"]["golden"]["rows"] < evaluation["modes"]["golden"]["rows"]
    assert evaluation["modes"]["golden"]["golden_rows"] == evaluation["modes"]["closed_book"]["rows"] - unknown
    table = pq.read_table(folder / "rows.parquet")
    for mode in MODES - {"retrieved"}:
        used = table.filter(table[f"{mode}_comparable"])
        mean = sum(used[f"{mode}_challenger"].to_pylist()) / sum(used[f"{mode}_tokens"].to_pylist())
        assert mean == pytest.approx(losses[mode])
        assert measured[f"loss_challenger_{mode}"] == pytest.approx(losses[mode])
    assert "golden citations" in measured["modes"]
    assert measured["modes_side_by_side"].startswith("![")


def the_gate_compares_another_mode(towns: TestProject, graph: Graph, folder: Path) -> None:
    write_settings(towns, mode="golden", max_loss_of={"closed_book": 0.0})
    decided = run(graph, "champion_adapter")
    (gate,) = decided.result.get_asset_check_evaluations()
    assert gate.metadata["mean"].value == pytest.approx(gain_of(folder, 0.95, "golden")[0].mean)
    assert "loss_increase_closed_book" in gate.metadata


def documents_change_and_the_index_is_dense(towns: TestProject) -> None:
    (towns.root / "towns" / "new.txt").write_text(passage(TOWNS[0]))
    shutil.copytree(PACKAGED["demo-base"], towns.root / "embedder")
    dense = {"source": "./towns", "index": {"kind": "dense", "model": "./embedder"}, "checks": {"min_hit": 0.0}}
    (towns.configs / "documents" / "towns.yaml").write_text(yaml.safe_dump(dense))


def the_report_shows_modes(towns: TestProject) -> None:
    report = collect(towns.store, towns.configs)
    assert report.problems == ()
    pages = dict(experiment_pages(report, Path("report.html"), towns.store.cache.derived))
    (measured,) = (entry.evaluated for entry in report.experiments if entry.name == "towns")
    assert measured
    for mode, result in measured.modes.items():
        assert pages["towns.html"].count(f"<td>{mode}</td>") == 2 * len(result["contenders"]), "in two tables"
    assert "<code>golden</code>" in pages["towns.html"], "the mode that the gate compares"
    assert pages["towns.html"].count("data:image/svg") == 3
