"""From rows to a changed answer of the running server, and a worse challenger that changes nothing."""

from pathlib import Path

import pytest
import yaml
from integration.graph import Graph
from projects import TestProject
from servers.vllm import Vllm

from finetune_assets.plots import style
from finetune_assets.serving.state import ServedRecords
from finetune_assets.serving.vllm import VllmServer

pytestmark = [pytest.mark.system, pytest.mark.soak, pytest.mark.minutes]


def train(project: TestProject, url: str, **training: float) -> None:
    """Edit the demo, so that it trains as is wanted and is served."""
    path: Path = project.configs / "experiments" / "demo.yaml"
    experiment = yaml.safe_load(path.read_text())
    experiment["training"] |= {"macro_batch_size": 2, "micro_batch_size": 2, **training}
    experiment["evaluation"] |= {"generated_rows": 0, "general_tokens": 500}
    experiment["serving"] = {"servers": [url]}
    path.write_text(yaml.safe_dump(experiment))


def test_each_champion_is_served(project: TestProject, vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "png", lambda figure: b"")
    graph, names, answers = Graph(), [], []
    for steps in (10, 30):
        train(project, vllm.url, max_steps=steps)
        run = graph.run()
        assert run.success, run.log
        names.append(str(run.metadata("served_adapter")["serves"]))
        answers.append(VllmServer(vllm.url).logprob(names[-1], [5, 6, 7, 8], 9))
        (check,) = (found for found in run.result.get_asset_check_evaluations() if found.check_name == "verified")
        numbers = {key: entry.value for key, entry in check.metadata.items()}
        assert (numbers["rows"], numbers["chat_rows"]) == (32, 32)
        assert numbers["distance_to_challenger"] < 1e-4
        assert numbers["distance_to_base"] > 0.5
    assert answers[0] != answers[1]
    assert {*vllm.adapters} == {*names}

    train(project, vllm.url, max_steps=2)
    run = graph.run()
    assert run.success, run.log
    current = ServedRecords(project.store, "demo").current()
    assert current
    assert current.name == names[1], "the champion stays, and so does what serves"
    assert {*vllm.adapters} == {*names}
