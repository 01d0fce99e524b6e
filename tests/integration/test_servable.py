"""What a server cannot serve is a warning before the training, and blocks it where the adapter is to be served."""

import dagster as dg
import pytest
from integration.graph import Graph, Run
from projects import SHORT, TestProject

DORA = "model: {base_model: demo-base}\nlora: {rank: 100, use_dora: true}\n"
SERVING = "serving: {servers: ['folder:./served'], max_rank: 128}\n"


def servable(run: Run) -> dg.AssetCheckEvaluation:
    (check,) = [found for found in run.result.get_asset_check_evaluations() if found.check_name == "servable"]
    return check


@pytest.mark.system
def test_warning_without_servers_and_blocked_with_them(project: TestProject, graph: Graph) -> None:
    project.write_experiment("demo", DORA)
    assets = ["dolly_raw", "cached_base_model", "tokenized_dataset", "training_plan"]
    planned = graph.run(assets, overrides=SHORT)
    assert planned.success, planned.log
    warned = servable(planned)
    assert (warned.passed, warned.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert warned.metadata["problems"].value == 2
    for text in ("lora.use_dora", "lora.rank is 100", "serving.max_rank to 128"):
        assert text in (warned.description or "")

    project.write_experiment("demo", DORA + SERVING)
    refused = graph.run([*assets, "lora_adapter"], overrides=SHORT)
    assert not refused.success
    assert refused.failures.keys() == {"training_plan"}
    assert "lora.use_dora" in refused.failures["training_plan"]
    assert "lora.rank is 100" not in refused.failures["training_plan"]
    assert project.published("adapters") == []

    project.write_experiment("demo", DORA.replace("true", "false") + SERVING)
    planned = graph.run(["training_plan"], overrides=SHORT)
    passed = servable(planned)
    assert passed.passed, passed.description
