"""Judgements in the graph: what the gate makes of them, and how answers of the served adapter train the next one."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from integration.daemon import Daemon, running
from integration.graph import UP_TO_CHAMPION, Graph, Run
from integration.test_daemon import inbox
from mistakes import mistakes, sample_rows, write_lines
from projects import TestProject

from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.layout import PREFERENCES
from finetune_assets.config.loading import load_experiment
from finetune_assets.reporting.collect import collect
from finetune_assets.reporting.pages import experiment_pages
from finetune_assets.serving.state import ServedRecords

__all__ = ["inbox"]
pytestmark = [pytest.mark.system, pytest.mark.soak, pytest.mark.minutes]
DPO = {"objective": "dpo", "max_steps": 30, "macro_batch_size": 4, "micro_batch_size": 4}
LOOP = """
subscribed: true
model: {base_model: demo-base, dtype: float32}
data:
  gate_fraction: 0.2
  prompt_template:
    prompt_input: "### Instruction: {instruction}\\n### Input: {context}\\n### Response: "
    prompt_no_input: "### Instruction: {instruction}\\n### Response: "
  tokenization: {cutoff_len: 96}
training:
  objective: dpo
  warm_start: champion
  preference: {reference: champion}
  max_steps: 8
  macro_batch_size: 4
  micro_batch_size: 4
  precision: fp32
  learning_rate: 1.0e-3
evaluation: {generated_rows: 4, general_tokens: 0, max_new_tokens: 4}
gate: {min_rows: 15}
serving: {servers: ["folder:./adapters"]}
"""


def gate_of(run: Run) -> Any:
    (gate,) = (check for check in run.result.get_asset_check_evaluations() if check.check_name == "gate")
    return gate


def test_the_bases_own_mistakes_are_unlearned_and_shuffled_judgements_are_refused(
    project: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = project.configs / "experiments" / "demo.yaml"
    settings = yaml.safe_load(demo.read_text())
    settings["training"] |= DPO
    settings["evaluation"] |= {"generated_rows": 60, "general_tokens": 1_000}
    demo.write_text(yaml.safe_dump(settings))
    (project.configs / "raw_data.yaml").write_text(
        "checks: {max_duplicate_share: 1.0, max_near_duplicate_share: 1.0}\n"
    )
    rows = sample_rows()
    pairs = mistakes(load_experiment(project.configs, "demo").config, rows)
    source = project.root / "rows.jsonl"
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(source))

    rng = random.Random(0)
    shuffled = [swapped(pair) if rng.random() < 0.5 else pair for pair in pairs]
    write_lines(source, [*rows, *shuffled])
    refused = graph.run(UP_TO_CHAMPION)
    assert refused.success, refused.log
    assert not gate_of(refused).passed
    numbers = refused.metadata("adapter_evaluation")
    assert numbers["loss_challenger"] < numbers["loss_base"], "refused for its preferences alone"
    assert Champions(project.store, "demo").history() == []

    write_lines(source, [*rows, *pairs])
    better = graph.run(UP_TO_CHAMPION)
    assert better.success, better.log
    gate = gate_of(better)
    assert gate.passed, gate.description
    assert gate.metadata["judgements"].value >= 30
    assert gate.metadata["preference_gain_lower"].value > 0
    numbers = better.metadata("adapter_evaluation")
    assert numbers["preference_accuracy_base"] == 0.5
    assert numbers["preference_accuracy_challenger"] > 0.8
    assert numbers["reward_margin_challenger"] > 0
    assert numbers["exact_match_challenger"] >= numbers["exact_match_base"]
    assert numbers["answer_words_challenger"] < numbers["answer_words_base"], "the base's mistakes are long"
    assert "reward_margins" in numbers
    dataset = better.metadata("tokenized_dataset")
    assert dataset["gate_pairs"] == gate.metadata["judgements"].value
    assert dataset["mean_rejected_tokens"] > dataset["mean_chosen_tokens"]
    (record,) = Champions(project.store, "demo").history()
    evaluation = project.store.resolve("evaluations", record.evaluation or "", "adapter_evaluation")
    assert (project.store.fetch(evaluation) / PREFERENCES).is_file()
    report = collect(project.store, project.configs)
    assert report.problems == ()
    page = dict(experiment_pages(report, Path("report.html"), project.store.cache.derived))["demo.html"]
    assert f"{dataset['gate_pairs']} held-out pairs" in page
    assert f"{numbers['preference_accuracy_challenger']:.1%}" in page
    assert page.count("data:image/svg") == 3, "with the margins"
    again = graph.run(UP_TO_CHAMPION)
    assert again.reused == {*UP_TO_CHAMPION}


def swapped(pair: dict[str, Any]) -> dict[str, Any]:
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


@pytest.mark.soak
def test_judgements_of_the_served_adapter_train_the_next_one(project: TestProject, inbox: Path) -> None:
    """Whose provenance names the served adapter; a promotion starts no further training."""
    project.write_experiment("loop", LOOP)
    config, rows = load_experiment(project.configs, "loop").config, sample_rows()
    write_lines(inbox / "first.jsonl", mistakes(config, rows[:150]))
    with running(project) as daemon:
        daemon.wait_for("a served adapter", lambda: daemon.made("served_adapter"))
        daemon.wait_for("no run", daemon.quiet)
        served = ServedRecords(project.store, "loop").current()
        champion = Champions(project.store, "loop").champion()
        assert served
        assert champion
        judged = mistakes(config, rows[150:250], project.store.fetch(champion), served.name)
        assert len(judged) > 30
        write_lines(inbox / ".second.jsonl", judged)
        (inbox / ".second.jsonl").rename(inbox / "second.jsonl")
        daemon.wait_for("a second evaluation", lambda: len(daemon.made("adapter_evaluation")) == 2)
        daemon.wait_for("no run", daemon.quiet)
        daemon.wait_for_ticks("experiments_sensor", 3)
        daemon.wait_for("no run", daemon.quiet)
        adapters = made(daemon, project)
    assert [adapter["warm_start"] for adapter in adapters] == [None, champion.fingerprint]
    assert "judged_adapters" not in adapters[0]
    assert adapters[1]["judged_adapters"] == {served.name: champion.fingerprint}


def made(daemon: Daemon, project: TestProject) -> Sequence[dict[str, Any]]:
    """Provenance of the adapters that were trained, in order."""
    fingerprints = [record.asset_materialization.tags["dagster/data_version"] for record in daemon.made("lora_adapter")]
    folders = [project.store.fetch(project.store.resolve("adapters", name, "lora_adapter")) for name in fingerprints]
    return [json.loads((folder / "provenance.json").read_text()) for folder in folders]
