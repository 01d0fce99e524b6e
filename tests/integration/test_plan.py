"""A training that does not fit is refused before it begins, and one that fits says later how well it was foreseen."""

import json

import dagster as dg
from integration.cli import materialize
from projects import TestProject

SHORT = ["training.max_steps=2", "evaluation.generated_rows=0"]


def test_what_does_not_fit_is_refused_with_what_would(project: TestProject) -> None:
    experiment = project.configs / "experiments" / "demo.yaml"
    text = experiment.read_text()
    experiment.write_text(text + "\nhardware: {gpu: small card, memory_gib: 0.05}\n")
    refused = materialize("*lora_adapter", overrides=SHORT)
    assert refused.returncode == 1
    assert "it does not fit 1 x small card" in refused.stdout
    assert "training.micro_batch_size=" in refused.stdout
    assert project.published("adapters") == []

    experiment.write_text(text + "\nhardware: {gpu: small card, memory_gib: 8, price_per_hour: 2}\n")
    trained = materialize("*lora_adapter", overrides=SHORT)
    assert trained.returncode == 0, trained.stdout
    with dg.DagsterInstance.get() as instance:
        (event,) = instance.fetch_materializations(dg.AssetKey("lora_adapter"), limit=1).records
    metadata = event.asset_materialization.metadata  # type: ignore[union-attr]
    (name,) = project.published("plans")
    plan = json.loads((project.store.fetch(project.store.resolve("plans", name, "")) / "plan.json").read_text())
    for measured in ("steps", "tokens"):
        assert metadata[f"predicted_{measured}"] == metadata[measured]
        assert metadata[measured].value == plan["work"][measured]
    assert metadata["predicted_peak_memory_mib"].value == plan["peak_memory_mib"]
    assert "| peak memory mib |" in str(metadata["predicted_and_measured"].value)
    assert "cost" in metadata
