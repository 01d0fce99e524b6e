"""A training that does not fit is refused before it begins, and one that fits says later how well it was foreseen."""

import json

from integration.graph import Graph
from projects import SHORT, TestProject


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
