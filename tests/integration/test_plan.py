"""A training that does not fit is refused before it begins, and one that fits says later how well it was foreseen."""

import json

import pytest
from integration.graph import Graph
from projects import SHORT, TestProject

OVERFITTED = (
    "data.num_samples=40",
    "data.val_fraction=0.3",
    "training.max_steps=40",
    "training.learning_rate=1e-2",
    "training.lr_scheduler=constant",
    "training.eval_steps=2",
    "training.patience=2",
)


@pytest.mark.system
def test_a_plan_and_its_training_name_measurements_and_what_stopping_saved(project: TestProject, graph: Graph) -> None:
    experiment = project.configs / "experiments" / "demo.yaml"
    experiment.write_text(experiment.read_text() + "\nhardware: {price_per_hour: 1000}\n")
    trained = graph.run("*lora_adapter", overrides=OVERFITTED)
    assert trained.success, trained.log
    plan, metadata = trained.metadata("training_plan"), trained.metadata("lora_adapter")
    assert (plan["evaluations"], plan["fewest_steps"], plan["predicted_steps"]) == (19, 6, 40)
    assert plan["predicted_evaluation_time_share"] > 0
    assert metadata["predicted_evaluation_time_share"] == plan["predicted_evaluation_time_share"]
    assert metadata["evaluation_time_share"] > 0
    assert metadata["steps"] + metadata["saved_steps"] == 40
    assert metadata["published_step"] < metadata["steps"] < 40
    assert metadata["saved_cost"] == pytest.approx(1000 * metadata["saved_device_hours"]) != 0
    assert f"Publishing the adapter of step {metadata['published_step']} of {metadata['steps']}" in trained.log


def test_what_does_not_fit_is_refused_with_what_would(project: TestProject, graph: Graph) -> None:
    experiment = project.configs / "experiments" / "demo.yaml"
    text = experiment.read_text()
    experiment.write_text(text + "\nhardware: {gpu: small card, memory_gib: 0.05}\n")
    refused = graph.run("*lora_adapter", overrides=SHORT)
    assert not refused.success
    assert refused.failures.keys() == {"training_plan"}
    assert "small card" in refused.failures["training_plan"]
    assert "training.micro_batch_size=" in refused.failures["training_plan"]
    assert project.published("adapters") == []

    experiment.write_text(text + "\nhardware: {gpu: small card, memory_gib: 8, price_per_hour: 2}\n")
    trained = graph.run("*lora_adapter", overrides=SHORT)
    assert trained.success, trained.log
    metadata = trained.metadata("lora_adapter")
    (name,) = project.published("plans")
    plan = json.loads((project.store.fetch(project.store.resolve("plans", name, "")) / "plan.json").read_text())
    for measured in ("steps", "tokens"):
        assert metadata[f"predicted_{measured}"] == metadata[measured]
        assert metadata[measured] == plan["work"][measured]
    assert metadata["predicted_peak_memory_mib"] == plan["peak_memory_mib"]
    assert "| peak memory mib |" in metadata["prediction_vs_actual"]
    assert "cost" in metadata
