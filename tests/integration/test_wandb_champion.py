"""A promoted champion is an artifact of Weights & Biases: online with its aliases, offline in a folder to be sent."""

from pathlib import Path

import pytest
import yaml
from integration.graph import Graph
from projects import TestProject
from servers import wandb as wandb_server
from servers.wandb import KEY

from finetune_assets.artifacts.champions import Champions
from finetune_assets.cli.main import finetune

pytestmark = pytest.mark.system


@pytest.fixture
def trains(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo, shortened so that its gate still passes, with its adapters logged."""
    path = project.configs / "experiments" / "demo.yaml"
    experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
    experiment["training"] |= {"macro_batch_size": 2, "micro_batch_size": 2, "max_steps": 10}
    experiment["evaluation"] |= {"generated_rows": 4, "general_tokens": 2_000}
    experiment["wandb"] = {"project": "p", "log_model": True}
    path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    monkeypatch.setenv("HOME", str(project.root / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.mark.soak
def test_online_the_alias_follows_each_promotion(
    project: TestProject, graph: Graph, trains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb_server.running() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        run = graph.run()
        assert run.success, run.log
        assert run.metadata("champion_adapter")["wandb_champion"] == "someone/p/champion-demo:champion"
        logged = [one for one in server.artifacts.values() if one.name == "champion-demo"]
        (record,) = Champions(project.store, "demo").history()
        assert [(one.committed, {*one.aliases} - {"latest"}) for one in logged] == [(True, {"champion", "record-1"})]
        assert logged[0].metadata["fingerprint"] == record.adapter
        assert any(path.endswith("adapter_model.safetensors") and logged[0].id in path for path in server.files)

        (adapter,) = project.published("adapters")
        other = project.configs / "experiments" / "other.yaml"
        other.write_text((project.configs / "experiments" / "demo.yaml").read_text(), encoding="utf-8")
        with pytest.raises(SystemExit) as end:
            finetune.main(["adapter", "promote", "other", adapter, "--reason", "a test"])
        assert not end.value.code
        by_hand = [one for one in server.artifacts.values() if one.name == "champion-other"]
        assert [{*one.aliases} - {"latest"} for one in by_hand] == [{"champion", "record-1"}]
    written = [path for path in project.root.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.soak
def test_without_a_server_it_is_recorded_and_nothing_fails(
    project: TestProject, graph: Graph, trains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = graph.run()
    assert run.success, run.log
    assert len(Champions(project.store, "demo").history()) == 1
    sync = str(run.metadata("champion_adapter")["wandb_champion"])
    assert sync.startswith("wandb beta sync ")
    assert list((project.cache / "wandb").glob(Path(sync.split()[-1]).name))
